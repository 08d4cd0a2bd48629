"""The page at `/`: static files of this package; the form's number fields come from the table of sampling parameters.

The page is a client of the API like any other. It needs no key itself, as it holds no data; its requests do. Its policy
lets it load and run only these files, speak only to this server, and turn no text into markup, so a model's text stays
text.
"""

import math
from hashlib import sha256
from html import escape
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from gristmill.inference.sampler import PARAMETERS

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


def form_fields() -> str:
    """Return one number field for each sampling parameter, as HTML."""
    fields = []
    for name, parameter in PARAMETERS.items():
        default = "random" if parameter.default is None else f"{parameter.default:g}"
        bounds = parameter.api_bounds
        attributes = {
            "min": bounds.low,
            **({} if bounds.high == math.inf else {"max": bounds.high}),
            "step": 1 if parameter.kind is int else "any",
            "placeholder": "as published" if parameter.is_published else default,
            "title": parameter.help,
        }
        said = " ".join(f'{key}="{escape(str(value))}"' for key, value in attributes.items())
        label = name.replace("_", " ").capitalize()
        fields.append(
            f'<p class="field"><label for="{name}">{label}</label><input id="{name}" type="number" {said}></p>'
        )
    return "\n".join(fields)


def add(path: str, file: Path) -> None:
    body = file.read_bytes().replace(b"<!-- sampling parameters -->", form_fields().encode())
    headers = {**HEADERS, "etag": f'"{sha256(body).hexdigest()[:32]}"'}

    @router.get(path)
    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=KINDS[file.suffix])


for path, file in FILES.items():
    add(path, file)
