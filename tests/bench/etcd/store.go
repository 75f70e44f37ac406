package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// address is where etcd listens for clients. Not the usual port: a native run must not meet the host's own etcd.
const address = "http://127.0.0.1:23790"

// store is etcd as its JSON gateway shows it. Bytes are base64 there, which is how encoding/json writes []byte, and
// 64-bit numbers are text.
type store struct {
	client http.Client
}

func newStore() *store {
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	return &store{http.Client{Transport: transport, Timeout: 5 * time.Minute}}
}

type pair struct {
	Key   []byte `json:"key"`
	Value []byte `json:"value,omitempty"`
}

type reply struct {
	Header struct {
		Revision string `json:"revision"`
	} `json:"header"`
	Pairs []pair `json:"kvs"`
}

// put stores a value and returns the store's revision.
func (s *store) put(key, value string) (uint64, error) {
	reply, err := s.call("/v3/kv/put", pair{[]byte(key), []byte(value)})
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(reply.Header.Revision, 10, 64)
}

// get returns the value of a key; a key without a value is empty.
func (s *store) get(key string) (string, error) {
	reply, err := s.call("/v3/kv/range", pair{Key: []byte(key)})
	if err != nil || len(reply.Pairs) == 0 {
		return "", err
	}
	return string(reply.Pairs[0].Value), nil
}

func (s *store) call(path string, request pair) (reply, error) {
	var answer reply
	body, err := json.Marshal(request)
	if err != nil {
		return answer, err
	}
	response, err := s.client.Post(address+path, "application/json", bytes.NewReader(body))
	if err != nil {
		return answer, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return answer, err
	}
	if response.StatusCode != http.StatusOK {
		return answer, fmt.Errorf("%s: %s: %s", path, response.Status, text)
	}
	return answer, json.Unmarshal(text, &answer)
}
