"""Image URLs that lead where no client may: each is a 400, and none of them a connection.

The server is taken to allow the worst hosts that an operator could write (ALLOWED_HOSTS); what stops these URLs is then
the one strict parse and the judgement of addresses alone.
"""

from __future__ import annotations

ALLOWED_HOSTS = "localhost,127.0.0.1,169.254.169.254,10.0.0.1,0.0.0.0,2130706433,0x7f.1,0177.0.0.1,127.1"
"""Allowed by mistake; none of them is a public address."""

HOSTILE_URLS = {
    # allowed by name, refused by address
    "name of loopback": "https://localhost/a.png",
    "name in capitals": "https://LOCALHOST/a.png",
    "name with port 443": "https://localhost:443/a.png",
    "loopback": "https://127.0.0.1/a.png",
    "metadata": "https://169.254.169.254/latest/meta-data/",
    "private": "https://10.0.0.1/a.png",
    "unspecified": "https://0.0.0.0/a.png",
    "decimal address": "https://2130706433/a.png",
    "hexadecimal address": "https://0x7f.1/a.png",
    "octal address": "https://0177.0.0.1/a.png",
    "short address": "https://127.1/a.png",
    # not allowed by name
    "another host": "https://images.example/a.png",
    "long decimal address": "https://2852039166/a.png",
    "long hexadecimal address": "https://0xa9fea9fe/a.png",
    "octal metadata": "https://0251.0376.0251.0376/a.png",
    "allowed name as a prefix": "https://localhost.evil.example/a.png",
    "allowed name as a suffix": "https://evil-localhost/a.png",
    "trailing dot": "https://localhost./a.png",
    "wildcard resolver": "https://127.0.0.1.nip.example/a.png",
    # IPv6 in all its dresses
    "IPv6 loopback": "https://[::1]/a.png",
    "IPv6 unspecified": "https://[::]/a.png",
    "IPv4-mapped": "https://[::ffff:127.0.0.1]/a.png",
    "IPv4-mapped in hexadecimal": "https://[::ffff:7f00:1]/a.png",
    "IPv4-compatible": "https://[::127.0.0.1]/a.png",
    "6to4": "https://[2002:7f00:1::]/a.png",
    "NAT64": "https://[64:ff9b::7f00:1]/a.png",
    "link-local with a zone": "https://[fe80::1%25eth0]/a.png",
    "unique local metadata": "https://[fd00:ec2::254]/a.png",
    # two parsers, two opinions
    "user": "https://localhost@evil.example/a.png",
    "user that looks like a host": "https://images.example:443@127.0.0.1/a.png",
    "backslash": "https://localhost\\@evil.example/a.png",
    "backslash for slashes": "https:\\\\127.0.0.1\\a.png",
    "backslash before the path": "https://127.0.0.1\\a.png",
    "three slashes": "https:///127.0.0.1/a.png",
    "one slash": "https:/127.0.0.1/a.png",
    "no slash": "https:127.0.0.1/a.png",
    "no scheme": "//127.0.0.1/a.png",
    "fragment with a host": "https://localhost#@evil.example/a.png",
    "query instead of a path": "https://localhost?.evil.example/a.png",
    "encoded host": "https://%6c%6f%63alhost/a.png",
    "encoded dot": "https://127%2e0%2e0%2e1/a.png",
    "full-width digits": "https://１２７.０.０.１/a.png",
    "circled letters": "https://ⓛocalhost/a.png",
    "ideographic full stop": "https://127。0。0。1/a.png",
    "Kelvin sign": "https://localhost/\u212a.png",
    "soft hyphen": "https://local\u00adhost/a.png",
    "zero-width space": "https://local\u200bhost/a.png",
    "punycode": "https://xn--lcalhost-54a/a.png",
    "two ports": "https://localhost:443:80/a.png",
    "empty port": "https://localhost:/a.png",
    "another port": "https://localhost:8265/a.png",
    "port in many digits": "https://localhost:00443/a.png",
    "port zero": "https://localhost:0/a.png",
    "empty host": "https:///a.png",
    "dots only": "https://../a.png",
    # bytes that end or begin a line elsewhere
    "space before": " https://localhost/a.png",
    "space after": "https://localhost/a.png ",
    "tab inside": "https://local\thost/a.png",
    "line feed after": "https://localhost/a.png\n",
    "header in the path": "https://localhost/a.png HTTP/1.1\r\nX-Injected: yes\r\n\r\n",
    "header in the host": "https://localhost\r\nX-Injected: yes/a.png",
    "NUL": "https://localhost\0.evil.example/a.png",
    "half an escape": "https://localhost/%0",
    # other schemes
    "http": "http://localhost/a.png",
    "file": "file:///etc/passwd",
    "file of a host": "file://localhost/etc/passwd",
    "ftp": "ftp://localhost/a.png",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "javascript": "javascript:alert(1)",
    "jar": "jar:https://localhost!/a.png",
    "scheme in capitals": "HTTPS://localhost/a.png",
    "relative path": "../../etc/passwd",
    "empty": "",
    "a very long one": "https://localhost/" + "a" * 5000,
    # data: URLs that are something else
    "data with text": "data:text/html;base64,PGI+",
    "data without base64": "data:image/png,abc",
    "data with a parameter": "data:image/png;charset=utf-8;base64,AAAA",
    "data with SVG": "data:image/svg+xml;base64,PHN2Zy8+",
    "data with a space": "data: image/png;base64,AAAA",
    "data without a type": "data:;base64,AAAA",
    "data with line breaks": "data:image/png;base64,iVBO\nRw0K",
    "data in the URL alphabet": "data:image/png;base64,__--",
    "data with its padding inside": "data:image/png;base64,AA==AAAA",
    "data without data": "data:image/png;base64,",
}
