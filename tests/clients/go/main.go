// SPDX-License-Identifier: PostgreSQL

// A service that uses DTM's Go client: it makes messages with and without business transactions that commit, answers who asks
// whether they did, and tells what its client told it. It goes on answering until its input ends.
package main

import (
	"database/sql"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"github.com/dtm-labs/client/dtmcli"
	_ "github.com/lib/pq"
)

var errOutOfOrder = errors.New("the service is out of order")

type service struct {
	db       *sql.DB
	dtm      string
	receiver string
	asked    string
}

func main() {
	if len(os.Args) != 4 {
		fmt.Println("usage: client DTM_SERVER DATABASE RECEIVER")
		os.Exit(2)
	}
	dtmcli.SetCurrentDBType(dtmcli.DBTypePostgres)
	db, err := sql.Open("postgres", os.Args[2])
	must(err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	s := &service{db: db, dtm: os.Args[1], receiver: os.Args[3], asked: fmt.Sprintf("http://%s/asked", listener.Addr())}
	http.HandleFunc("/asked", s.answer)
	go func() { must(http.Serve(listener, nil)) }()

	tell("committed", s.message("committed").DoAndSubmitDB(s.asked, db, s.book("committed", nil)))
	tell("refused", s.message("refused").DoAndSubmitDB(s.asked, db, s.book("refused", dtmcli.ErrFailure)))
	tell("broken", s.message("broken").DoAndSubmitDB(s.asked, db, s.book("broken", errOutOfOrder)))
	tell("crashed", s.crash("crashed", nil))
	tell("crashed-before", s.crash("crashed-before", errOutOfOrder))

	waiting := s.message("waiting")
	waiting.WaitResult = true
	tell("waiting", waiting.Submit())
	tell("again", s.message("committed").Prepare(s.asked))
	fmt.Println("done")
	_, err = io.Copy(io.Discard, os.Stdin)
	must(err)
}

func (s *service) message(gid string) *dtmcli.Msg {
	return dtmcli.NewMsg(s.dtm, gid).Add(s.receiver, map[string]int{"amount": 30})
}

// book is a business transaction that ends with an error, or commits.
func (s *service) book(gid string, end error) dtmcli.BarrierBusiFunc {
	return func(tx *sql.Tx) error {
		if _, err := tx.Exec("INSERT INTO booking VALUES ($1)", gid); err != nil {
			return err
		}
		return end
	}
}

// crash is a service that dies between its business transaction and the submission.
func (s *service) crash(gid string, end error) error {
	message := s.message(gid)
	message.TimeoutToFail = 1
	if err := message.Prepare(s.asked); err != nil {
		return err
	}
	barrier, err := dtmcli.BarrierFrom("msg", gid, "00", "msg")
	if err != nil {
		return err
	}
	return barrier.CallWithDB(s.db, s.book(gid, end))
}

// answer tells whether a business transaction has committed.
func (s *service) answer(w http.ResponseWriter, r *http.Request) {
	barrier, err := dtmcli.BarrierFromQuery(r.URL.Query())
	if err == nil {
		err = barrier.QueryPrepared(s.db)
	}
	switch {
	case errors.Is(err, dtmcli.ErrFailure):
		w.WriteHeader(http.StatusConflict)
	case err != nil:
		w.WriteHeader(http.StatusInternalServerError)
	}
	fmt.Fprintln(w, err)
}

func tell(name string, err error) {
	fmt.Printf("%s: %v\n", name, err)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}
