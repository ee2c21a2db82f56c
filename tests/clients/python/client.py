# SPDX-License-Identifier: PostgreSQL
"""Makes messages by dtmcli of PyPI, and tells what it told."""

import sys

from dtmcli import msg, utils

dtm, receiver = sys.argv[1:]


def message(gid):
    return msg.Msg(dtm, gid).add({"amount": 30}, receiver).add({"amount": 40}, receiver)


def tell(name, call):
    try:
        call()
        print(f"{name}: None")
    except Exception as error:  # whatever the client raises is what is looked at
        print(f"{name}: {type(error).__name__} {error}")


def refused(_barrier):
    raise utils.DTMFailureError("no stock")


prepared = message("py-prepared")
tell("prepare", lambda: prepared.prepare(receiver))
tell("submit", prepared.submit)
tell("wait", message("py-wait").set_wait_result().submit)
tell("refused", lambda: message("py-refused").do_and_submit(receiver, refused))
tell("wrong", lambda: msg.Msg(dtm, "py-wrong").add({}, "nowhere").submit())
print("gid:", len(utils.gen_gid(dtm)))
