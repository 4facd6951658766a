"""Checks mathematical answers in a process of its own; run as a script, one JSON line in, one out.

It lives apart because parsing and comparing can hang inside C code, where nothing but the end of the process helps.
"""

import json
import sys


def main() -> None:
    # The folder of a script comes first on the path, where our files could hide a library's modules.
    sys.path.pop(0)
    from math_verify import parse, verify

    verify(parse("1", parsing_timeout=None), parse("$1$", parsing_timeout=None), timeout_seconds=None)  # fills caches
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        answer, completion = json.loads(line)
        try:
            # The parent keeps the time: math_verify's own alarms need the main thread and do not stop C code.
            gold = parse(answer, parsing_timeout=None)
            found = parse(completion, parsing_timeout=None)
            reply: dict[str, object] = {
                "correct": bool(gold) and bool(verify(gold, found, timeout_seconds=None)),
                "parsed": bool(gold),
            }
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
