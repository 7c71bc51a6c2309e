"""A chain's node on this machine, as far as the wallet knows one: `python chain.py 8545`.

GET /blocks?after=N lists the blocks above height N; POST /transfers mines a block of the transfers in its body.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

BLOCKS = []


class Node(BaseHTTPRequestHandler):
    def do_GET(self):
        after = int(parse_qs(urlsplit(self.path).query).get("after", ["0"])[0])
        self.answer(BLOCKS[after:])

    def do_POST(self):
        transfers = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        BLOCKS.append({"height": len(BLOCKS) + 1, "transfers": transfers})
        self.answer(BLOCKS[-1])

    def answer(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Node)
    print(f"node at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
