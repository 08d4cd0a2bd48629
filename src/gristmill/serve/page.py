"""The page at `/`: files of this package, sent as they are. What it shows it asks of the API, as any client does.

It needs no key itself, as it holds nothing; what it asks for does. Its policy lets it load and run these files alone,
speak to this server alone, and turn no text into markup, so that what a model writes stays text.
"""

from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

WEB = Path(__file__).parent / "web"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/" if file.name == "index.html" else f"/page/{file.name}": file
    for file in sorted(WEB.iterdir())
    if file.suffix in KINDS
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # a newer server has a newer page
}
router = APIRouter(include_in_schema=False)


def add(path: str, file: Path) -> None:
    body = file.read_bytes()
    headers = {**HEADERS, "etag": f'"{sha256(body).hexdigest()[:32]}"'}

    @router.get(path)
    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=KINDS[file.suffix])


for path, file in FILES.items():
    add(path, file)
