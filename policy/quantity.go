package policy

import (
	"errors"
	"fmt"
	"math/big"
	"regexp"
)

// quantityForm is the part of Kubernetes' quantities that can mean whole
// bytes: no milli and smaller, no exponents. The digits are bounded, for the
// arithmetic is exact.
var quantityForm = regexp.MustCompile(`^([+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?)(k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$`)

var errQuantity = errors.New("must be a number of bytes")

// ParseQuantity reads a Kubernetes quantity of whole bytes: "65536", "64k",
// "64Ki", "1.5Mi".
func ParseQuantity(s string) (Quantity, error) {
	m := quantityForm.FindStringSubmatch(s)
	if m == nil {
		return 0, errQuantity
	}
	n, ok := new(big.Rat).SetString(m[1])
	if !ok {
		return 0, errQuantity
	}
	n.Mul(n, new(big.Rat).SetInt(unit(m[2])))
	if !n.IsInt() {
		return 0, fmt.Errorf("%w, and whole ones", errQuantity)
	}
	if !n.Num().IsInt64() {
		return 0, fmt.Errorf("%w below 8Ei", errQuantity)
	}
	return Quantity(n.Num().Int64()), nil
}

// unit is the number of bytes that a suffix stands for.
func unit(suffix string) *big.Int {
	if suffix == "" {
		return big.NewInt(1)
	}
	base := int64(1000)
	if len(suffix) == 2 {
		base = 1024
	}
	power := map[byte]int64{'k': 1, 'K': 1, 'M': 2, 'G': 3, 'T': 4, 'P': 5, 'E': 6}[suffix[0]]
	return new(big.Int).Exp(big.NewInt(base), big.NewInt(power), nil)
}
