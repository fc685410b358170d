"""python -m tests.load.reading [--messages 1000000] [--seed n]: two readers of messages, compared.

Workers read batches with msgspec and leave the rest to the contract's models (worker/wire.py). The
last line is `reading: seed=… messages=… read=… differing=0`; a message that is read in another way
ends the run with it.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests.support.message_fuzz import compare

CHUNK = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    arguments = parser.parse_args()
    read = differing = done = 0
    for chunk in range(-(-arguments.messages // CHUNK)):
        try:
            read += compare(arguments.seed + chunk, CHUNK)["read"]
        except AssertionError as error:
            print(f"seed {arguments.seed + chunk}: {error}")
            differing += 1
        done += CHUNK
    print(f"reading: seed={arguments.seed} messages={done} read={read} differing={differing}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
