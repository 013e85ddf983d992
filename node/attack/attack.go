// Package attack is what detection yields and the console shows: hits, and
// attacks that group them.
//
// It is pure: no clock, no store, no traffic. Everything from detection
// downstream may import it; it imports nothing of ours.
package attack

import (
	"math"
	"time"
)

// Type is a class of attack, by the names analysts use.
type Type string

const (
	PathTraversal     Type = "path-traversal"
	FileInclusion     Type = "file-inclusion"
	SQLInjection      Type = "sql-injection"
	XSS               Type = "xss"
	CommandInjection  Type = "command-injection"
	CodeInjection     Type = "code-injection" // PHP, Java, Node.js, templates
	SSRF              Type = "ssrf"
	SessionFixation   Type = "session-fixation"
	Scanner           Type = "scanner"
	ProtocolViolation Type = "protocol-violation"
	DataLeakage       Type = "data-leakage" // found in responses
	Other             Type = "other"
)

// Severity orders attacks; the words are CRS's.
type Severity int

const (
	Notice Severity = iota + 1
	Warning
	Error
	Critical
)

// Place is a part of an exchange that can carry a payload.
type Place string

const (
	InPath       Place = "path"
	InQuery      Place = "query"     // Name is the parameter
	InHeader     Place = "header"    // Name is the header, lower case
	InCookie     Place = "cookie"    // Name is the cookie
	InForm       Place = "form"      // Name is the field, also of multipart bodies
	InJSON       Place = "json"      // Name is the path, such as $.user.name
	InXML        Place = "xml"       // Name is the path, if known
	InBody       Place = "body"      // the raw request body
	InRequest    Place = "request"   // the request line or the request as a whole
	InResponse   Place = "response"  // the response body
	InRespHeader Place = "resp-head" // Name is the response header
	InMultipart  Place = "multipart" // Name is a part's header or file name
	InNone       Place = ""
)

// Location is where in the exchange a rule matched.
type Location struct {
	Place Place  `json:"place"`
	Name  string `json:"name,omitempty"`
}

// Match is one rule's match in one location.
type Match struct {
	RuleID   int      `json:"ruleId"`
	Type     Type     `json:"type"`
	Severity Severity `json:"severity"`
	Message  string   `json:"message"`        // the rule's own words
	Tags     []string `json:"tags,omitempty"` // the rule's tags
	Location Location `json:"location"`
	Value    []byte   `json:"value,omitempty"` // the raw value at Location, at most MaxValueBytes around the match
	Start    int      `json:"start"`           // [Start,End) of the matched part within Value; equal if unknown
	End      int      `json:"end"`
	Excluded bool     `json:"excluded,omitempty"` // silenced by a policy's exclusion: kept for audit, never scored
}

// MaxValueBytes bounds Match.Value.
const MaxValueBytes = 2048

// Hit is one exchange × one attack type.
type Hit struct {
	ID          string    `json:"id"` // unique: gateway VM, exchange number, type
	Time        time.Time `json:"time"`
	Type        Type      `json:"type"`
	Severity    Severity  `json:"severity"` // highest of the matches
	Score       int       `json:"score"`    // CRS anomaly score of the matches that count
	Tenant      string    `json:"tenant,omitempty"`
	Application string    `json:"application,omitempty"`
	Policy      string    `json:"policy"`
	PolicyRev   string    `json:"policyRev,omitempty"`
	Gateway     string    `json:"gateway"`
	Client      string    `json:"client"` // IP address, without port
	Location    Location  `json:"location"`
	Matches     []Match   `json:"matches"`
	Weight      float64   `json:"weight"` // exchanges this one stands for: 1 / sampling probability
	Exchange    Exchange  `json:"exchange"`
}

// Exchange is the sample of traffic kept with a hit, as the gateway sent it:
// masked there, cut there.
type Exchange struct {
	Method    string        `json:"method"`
	Scheme    string        `json:"scheme"`
	Host      string        `json:"host"`
	Path      string        `json:"path"` // with the query
	Protocol  string        `json:"protocol"`
	TLS       string        `json:"tls,omitempty"`
	SNI       string        `json:"sni,omitempty"`
	Route     string        `json:"route,omitempty"`
	Peer      string        `json:"peer,omitempty"`
	Status    int           `json:"status"` // 0: no response seen
	Duration  time.Duration `json:"durationNs"`
	Flags     string        `json:"responseFlags,omitempty"`   // Envoy's, such as "DC": how it went wrong
	Details   string        `json:"responseDetails,omitempty"` // and its words for it
	Request   Message       `json:"request"`
	Response  Message       `json:"response"`
	Truncated bool          `json:"truncated,omitempty"` // a body or header list is incomplete
}

// Message is one direction's copy.
type Message struct {
	Headers   []Field `json:"headers,omitempty"` // without pseudo-headers
	Body      []byte  `json:"body,omitempty"`
	BodyBytes uint64  `json:"bodyBytes"` // true length
}

// Field is a header line.
type Field struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Attack is a group of hits with the same Key, without a gap longer than
// SessionGap.
type Attack struct {
	ID          string    `json:"id"`
	Key         string    `json:"-"`
	Type        Type      `json:"type"`
	Severity    Severity  `json:"severity"`
	Tenant      string    `json:"tenant,omitempty"`
	Application string    `json:"application,omitempty"`
	Policy      string    `json:"policy"`
	Gateway     string    `json:"gateway"`
	Client      string    `json:"client"`
	Method      string    `json:"method"`
	Host        string    `json:"host"`
	Path        string    `json:"path"` // the template, see PathTemplate
	Location    Location  `json:"location"`
	RuleIDs     []int     `json:"ruleIds"` // ascending, all hits'
	Payload     string    `json:"payload"` // the newest hit's matched part, at most 256 bytes
	Status      int       `json:"status"`  // the newest hit's response status
	First       time.Time `json:"first"`
	Last        time.Time `json:"last"`
	Count
}

// Count is hits, and how many there were before sampling, estimated from them.
type Count struct {
	Hits      int64   `json:"hits"`             // seen by the node
	Estimated float64 `json:"estimatedHits"`    // sum of weights: Horvitz and Thompson's estimate
	Variance  float64 `json:"estimateVariance"` // estimate of its variance: sum of w(w−1)
}

// Add counts a hit of this weight, at least 1.
func (c *Count) Add(weight float64) {
	c.Hits++
	c.Estimated += weight
	c.Variance += weight * (weight - 1)
}

// Sampled tells whether a hit stands for more than itself.
func (c Count) Sampled() bool { return c.Variance > 0 }

// Error is the standard error of Estimated, as far as hits were sampled
// independently of each other.
func (c Count) Error() float64 { return math.Sqrt(c.Variance) }

// SessionGap ends an attack: a later hit with the same key opens a new one.
const SessionGap = time.Hour
