"""Requests as bytes on the wire, with headers that no client library would send, and the statuses each may have.

Status 0 is a connection that the server ends without an answer. Where HTTP leaves it open how a broken message is
refused, several statuses stand here; where it is one that was meant for another parser (smuggling), no 200 does.
"""

from __future__ import annotations

import json

from tests.service.examples import body, user

CHAT = "/v1/chat/completions"
REFUSED = {400}
CLOSED = {0, 400}


def plain(model: str) -> bytes:
    return json.dumps(body(user("hello"), model=model, max_tokens=1, temperature=0)).encode()


def request(content: bytes, *headers: str, line: str = f"POST {CHAT} HTTP/1.1", only: bool = False) -> bytes:
    """A request; with `only`, no header but those named."""
    usual = () if only else ("Host: localhost", "Content-Type: application/json", f"Content-Length: {len(content)}")
    return "\r\n".join([line, *usual, *headers, "Connection: close", "", ""]).encode("latin-1") + content


def chunked(content: bytes, *headers: str, sizes: bytes | None = None, end: bytes = b"0\r\n\r\n") -> bytes:
    """The same in one chunk; its size line may lie."""
    head = request(
        b"", "Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked", *headers, only=True
    )
    return head + (sizes if sizes is not None else b"%x\r\n" % len(content)) + content + b"\r\n" + end


def get(path: str, *headers: str, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return request(b"", "Host: localhost", *headers, line=f"{method} {path} {version}", only=True)


def wire_requests(model: str) -> dict[str, tuple[bytes, set[int]]]:
    """Name to (bytes, statuses)."""
    content = plain(model)
    host, media_type, length = "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(content)}"

    def typed(*values: str) -> bytes:
        return request(content, host, length, *(f"Content-Type: {value}" for value in values), only=True)

    def sized(*values: str) -> bytes:
        return request(content, host, media_type, *(f"Content-Length: {value}" for value in values), only=True)

    def coded(*values: str) -> bytes:
        head = (f"Transfer-Encoding: {value}" for value in values)
        return request(b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content), host, media_type, *head, only=True)

    return {
        # content-type
        "no type": (typed(), {415}),
        "an empty type": (typed(""), {415}),
        "plain text": (typed("text/plain"), {415}),
        "a form": (typed("application/x-www-form-urlencoded"), {415}),
        "nearly JSON": (typed("application/jsonp"), {415}),
        "a type of 60 KB": (typed("a/" + "b" * 60_000), {0, 400, 415}),
        "two types": (typed("text/plain", "application/json"), {400, 415}),
        "a type in capitals": (typed("APPLICATION/JSON; Charset=UTF-8"), {200}),
        "a charset nobody knows": (typed("application/json; charset=klingon"), {200, 415}),
        # content-length
        "no length": (sized(), {400, 411}),
        "a negative length": (sized("-1"), CLOSED),
        "a length with a plus": (sized(f"+{len(content)}"), CLOSED),
        "a hexadecimal length": (sized("0x10"), CLOSED),
        "a length of text": (sized("many"), CLOSED),
        "a length of 30 digits": (sized("9" * 30), {0, 400, 413}),
        "a length of 1 TB": (sized(str(10**12)), {413}),
        "two lengths": (sized(str(len(content)), "5"), CLOSED),
        "two equal lengths": (sized(str(len(content)), str(len(content))), {200, 400}),
        "two lengths in one": (sized(f"{len(content)}, 5"), CLOSED),
        "a length that is too small": (sized("5"), REFUSED),
        "a length of 0": (sized("0"), REFUSED),
        # transfer-encoding: every form that two parsers read differently
        "chunked": (chunked(content), {200}),
        "chunked and a length": (chunked(content, "Content-Length: 5"), {0, 200, 400}),  # RFC 9112, 6.3: chunks count
        "a length and chunked": (request(content, "Transfer-Encoding: chunked"), CLOSED),
        "chunked twice": (coded("chunked", "chunked"), {0, 400, 501}),
        "chunked, then identity": (coded("chunked, identity"), {0, 400, 501}),
        "xchunked": (coded("xchunked"), {0, 400, 501}),
        "chunked behind a tab": (coded("\tchunked"), {200, 0, 400, 501}),
        "chunked behind a vertical tab": (coded("\x0bchunked"), {0, 400, 501}),
        "gzip": (coded("gzip"), {0, 400, 501}),
        "a space before the colon": (coded("chunked").replace(b"Encoding:", b"Encoding :"), CLOSED),
        "a negative chunk": (chunked(content, sizes=b"-1\r\n"), CLOSED),
        "a chunk of 2**64": (chunked(content, sizes=b"10000000000000000\r\n"), CLOSED),
        "a chunk of text": (chunked(content, sizes=b"zz\r\n"), CLOSED),
        "a chunk that is too small": (chunked(content, sizes=b"5\r\n"), CLOSED),
        "a chunk with an extension": (chunked(content, sizes=b"%x;a=b\r\n" % len(content)), {200, 400}),
        "a chunk with 100 KB of extension": (
            chunked(content, sizes=b"%x;%b\r\n" % (len(content), b"a" * 100_000)), {0, 200, 400}
        ),
        "a trailer": (chunked(content, end=b"0\r\nX-Late: yes\r\n\r\n"), {200, 400}),
        # other headers of HTTP
        "expect": (request(content, "Expect: 100-continue"), {200}),
        "expect the unknown": (request(content, "Expect: the-unexpected"), {200, 417}),
        "a range": (request(content, "Range: bytes=0-1,0-2,0-3"), {200}),
        "conditions": (request(content, 'If-Match: "x"', "If-Modified-Since: never"), {200}),
        "an encoding of the body": (request(content, "Content-Encoding: gzip"), {200, 400, 415}),
        "all encodings but identity": (request(content, "Accept-Encoding: identity;q=0, *;q=0"), {200}),
        "nothing acceptable": (request(content, "Accept: image/*"), {200}),
        "an upgrade to WebSocket": (
            get(CHAT, "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="), {405},
        ),
        "an upgrade to HTTP/2": (
            request(content, "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"), {200, 400}
        ),
        "forwarded": (request(content, "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: a", "Forwarded: for=b"), {200}),
        "another method": (request(content, "X-HTTP-Method-Override: DELETE"), {200}),
        "another path": (request(content, "X-Original-URL: /metrics", "X-Rewrite-URL: /metrics"), {200}),
        "bearers": (request(content, "Authorization: Bearer a", "Authorization: Bearer b"), {200, 401}),
        "a bearer of 60 KB": (request(content, "Authorization: Bearer " + "a" * 60_000), {0, 200, 400, 401}),
        "a bearer of bytes": (request(content, "Authorization: Bearer \xff\xfe"), {200, 400, 401}),
        "basic": (request(content, "Authorization: Basic OjpAOg=="), {200, 401}),
        "no scheme": (request(content, "Authorization: sk-123"), {200, 401}),
        # headers of ours and of Ray Serve
        "strength: text": (request(content, "x-steering-strength: strong"), REFUSED),
        "strength: NaN": (request(content, "x-steering-strength: NaN"), REFUSED),
        "strength: exponent": (request(content, "x-steering-strength: 1e-1"), REFUSED),
        "strength: Arabic digits": (request(content, "x-steering-strength: \xd9\xa1"), REFUSED),
        "strength: twice": (request(content, "x-steering-strength: 0", "x-steering-strength: 1"), {200, 400}),
        "strength: of 50 KB": (request(content, "x-steering-strength: 0." + "1" * 50_000), {0, 400}),
        "request id: of 200": (request(content, "x-request-id: " + "a" * 200), REFUSED),
        "request id: a header": (request(content, "x-request-id: a%0d%0aSet-Cookie: b"), REFUSED),
        "request id: bytes": (request(content, "x-request-id: \xff"), REFUSED),
        "request id: empty": (request(content, "x-request-id: "), {200, 400}),
        "request id: twice": (request(content, "x-request-id: a", "x-request-id: b"), {200, 400}),
        "go on without me": (request(content, "x-request-disconnect-disabled: ?1"), REFUSED),
        "take for ever": (request(content, "x-request-timeout-seconds: 1e9"), REFUSED),
        "take for bytes": (request(content, "x-request-timeout-seconds: \xff"), REFUSED),
        "go on without bytes": (request(content, "x-request-disconnect-disabled: \xff"), REFUSED),
        "a probe for bytes": (get("/healthz", "x-request-timeout-seconds: \xff"), REFUSED),
        "another model's replica": (request(content, "serve_multiplexed_model_id: other"), {200}),
        "a replica of bytes": (request(content, "Serve-Multiplexed-Model-Id: \xff"), {200}),
        "a session of bytes": (request(content, "x-session-id: \xff"), {200}),
        "a session of bytes, renamed": (request(content, "X_Session_Id: \xff"), {200}),
        "a look-up with a body": (
            request(bytes(20_000), "Host: localhost", "Content-Length: 20000", line="GET /healthz HTTP/1.1", only=True),
            {413},
        ),
        "another application": (request(content, "serve-app-name: other", "route: /other"), {200}),
        "a trace that is none": (request(content, f"traceparent: 00-{'f' * 32}-{'0' * 16}-zz"), {200}),
        "a trace of many": (request(content, "tracestate: " + "a=b," * 99), {200}),
        "all of Ray": (request(content, "x-ray-authorization: Bearer x", "ray-serve-grpc: 1"), {200}),
        # header syntax
        "no host": (request(content, media_type, length, only=True), {400}),
        "two hosts": (request(content, "Host: b"), {200, 400}),
        "a host that is none": (request(content, "Host: a b/../\x01", media_type, length, only=True), {400}),
        "a folded header": (request(content, "X-A: b\r\n c"), {200, 400}),
        "a header without a colon": (request(content, "hello"), CLOSED),
        "a header without a name": (request(content, ": hello"), CLOSED),
        "a space in a name": (request(content, "X A: b"), CLOSED),
        "a NUL in a name": (request(content, "X\0A: b"), CLOSED),
        "a NUL in a value": (request(content, "X-A: b\0c"), CLOSED),
        "a bare line feed": (request(content).replace(b"\r\n", b"\n"), {0, 200, 400}),
        "a bare carriage return": (request(content, "X-A: b\rX-B: c"), CLOSED),
        "1000 headers": (request(content, *(f"X-{index}: a" for index in range(1000))), {0, 200, 400}),
        "a header of 1 MB": (request(content, "X-A: " + "a" * 1_000_000), {0, 400}),
        # the request line
        "lower case": (request(content, line=f"post {CHAT} HTTP/1.1"), {0, 400, 405}),
        "a method nobody knows": (get(CHAT, method="CHAT"), {0, 400, 405}),
        "a method of 10 KB": (get(CHAT, method="A" * 10_000), {0, 400, 405}),
        "TRACE": (get(CHAT, "Cookie: secret", method="TRACE"), {0, 400, 405}),
        "CONNECT": (get("169.254.169.254:80", method="CONNECT"), {0, 400, 404, 405}),
        "OPTIONS": (get("*", method="OPTIONS"), {404}),
        "HEAD": (get(CHAT, method="HEAD"), {405}),
        "another host's URL": (get("http://169.254.169.254/latest/meta-data/"), {400, 404}),
        "a path above the root": (get("/v1/models/../../../etc/passwd"), {404}),
        "a path above the root, escaped": (get("/v1/models/..%2f..%2f..%2fetc%2fpasswd"), {404}),
        "a path above the root, escaped twice": (get("/v1/models/%252e%252e%252f"), {404}),
        "two slashes": (get("//v1//models"), {404}),
        "a slash behind": (request(content, line=f"POST {CHAT}/ HTTP/1.1"), {404, 405}),
        "a NUL in the path": (get("/v1/models/%00"), {404}),
        "bytes in the path": (get("/v1/models/%ff%fe"), {404}),
        "a path of 60 KB": (get("/" + "a" * 60_000), {0, 400, 404}),
        "a query of 60 KB": (get("/healthz?" + "a" * 60_000), {0, 200, 400}),
        "a line feed in the path": (get("/v1/models/%0d%0aSet-Cookie:%20a=b"), {404}),
        "Serve's own routes": (get("/-/routes"), {200, 401, 404}),
        "Serve's own health": (get("/-/healthz"), {200, 404}),
        "documentation": (get("/docs"), {404}),
        "HTTP/0.9": (b"GET /healthz\r\n\r\n", {0, 200, 400}),
        "HTTP/1.0": (request(content, line=f"POST {CHAT} HTTP/1.0"), {200}),
        "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", CLOSED),
        "HTTP/9.9": (get("/healthz", version="HTTP/9.9"), {0, 200, 400, 505}),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), CLOSED),
        "an SSH client": (b"SSH-2.0-OpenSSH_9.9\r\n", CLOSED),
        "Redis": (b"*1\r\n$8\r\nFLUSHALL\r\n", CLOSED),
        "garbage": (bytes(range(256)) * 10, CLOSED),
    }  # fmt: skip
