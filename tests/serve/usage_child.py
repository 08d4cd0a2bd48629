"""A server's end of requests, to be killed: says a line for each request when it is in the table, and not before."""

import sys
import threading

from gristmill.serve.database import Database
from gristmill.serve.usage import Prices, Usage


def main(file: str, num_threads: int) -> None:
    usage = Usage(Database(file), Prices())

    def requests(number: int) -> None:
        while True:
            usage.record(f"key-{number}", "model", "2026-01-31", 3, 5).result()
            sys.stdout.write(f"{number}\n")  # one write: lines of threads do not mix
            sys.stdout.flush()

    for number in range(num_threads):
        threading.Thread(target=requests, args=(number,)).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
