package result

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// marks stand around the section of the benchmark of this name.
func marks(name string) (begin, end string) {
	return "<!-- " + name + ":begin -->", "<!-- " + name + ":end -->"
}

// splice replaces what stands between the marks.
func splice(doc, name, section string) (string, error) {
	begin, end := marks(name)
	if strings.Count(doc, begin) != 1 || strings.Count(doc, end) != 1 {
		return "", fmt.Errorf("want the lines %s and %s once each", begin, end)
	}
	head, rest, _ := strings.Cut(doc, begin)
	_, tail, ok := strings.Cut(rest, end)
	if !ok {
		return "", fmt.Errorf("%s stands before %s", end, begin)
	}
	return head + begin + "\n" + strings.TrimRight(section, "\n") + "\n" + end + tail, nil
}

// Check tells whether WriteInto would find the marks.
func Check(file, name string) error {
	doc, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	if _, err := splice(string(doc), name, ""); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}

// WriteInto puts a section between the file's marks <!-- name:begin --> and
// <!-- name:end -->, or leaves the file as it was.
func WriteInto(file, name, section string) error {
	old, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	doc, err := splice(string(old), name, section)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), ".bench-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	defer os.Remove(tmp.Name()) // gone already after the rename
	_, err = tmp.WriteString(doc)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}
