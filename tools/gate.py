"""
What stands before the endpoints of tools/serve.py: who may come in, how much they may send, and how errors are told.
"""
import json
import secrets

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

MAX_BODY = 2 ** 24  # bytes of one request


class Refused(Exception):
    """An error that goes to the client in OpenAI's form."""

    def __init__(self, status, message, type="invalid_request_error", code=None, param=None):
        self.status = status
        self.error = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self):
        headers = {"Retry-After": "1"} if self.status == 429 else {}
        return Response(to_json(self.error), self.status, headers, media_type="application/json")


def to_json(value):
    # half a surrogate pair, from an escape in JSON of a user or of the model, is no UTF-8: it becomes "?"
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def event(value):
    """A server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Gate:
    """Stands before the application: looks at a request's headers, then at how long its body gets."""

    def __init__(self, app, api_key):
        self.app = app
        self.expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope, receive, send):
        # the page and /health are open to all
        app = self.app
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            try:
                self.look_at(scope["method"], Headers(scope=scope))
                receive = await self.take_body(receive)
            except Refused as refused:
                app = refused.response()
        await app(scope, receive, send)

    def look_at(self, method, headers):
        given = headers.get("authorization", "").encode("latin-1")  # the bytes, as they came
        # compare_digest takes equally long wherever the first difference is, so nobody can guess letter by letter
        if self.expected and not secrets.compare_digest(given, self.expected):
            raise Refused(401, "wrong or missing API key (Authorization: Bearer …)", code="invalid_api_key")
        # what is too long by its own account need not be sent
        if int(headers.get("content-length", 0)) > MAX_BODY:
            self.too_long()
        if method == "POST" and not headers.get("content-type", "").lower().startswith("application/json"):
            raise Refused(415, "send JSON, and the header Content-Type: application/json")
        packed = headers.get("content-encoding", "identity")
        if packed != "identity":
            raise Refused(415, f"send the body as it is: Content-Encoding: {packed} is not offered here")

    async def take_body(self, receive):
        """Read a body, which may come in chunks of no length told before, as far as MAX_BODY; return a function that
        gives it to the application, and after it what comes later."""
        messages = []
        size = 0
        more = True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                self.too_long()
            more = message.get("more_body", False)

        async def again():
            return messages.pop(0) if messages else await receive()

        return again

    def too_long(self):
        raise Refused(413, f"a body has at most {MAX_BODY:,} bytes")


def tell_errors(app):
    """Whatever goes wrong in the application, the client gets OpenAI's form of an error."""

    @app.exception_handler(Refused)
    async def refused(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        # of all that pydantic found wrong, what lies deepest: {"loc": ("body", "messages", 0, "role"), "msg": …}. Of a
        # content that is a list it says, too, that it is no text
        first = max(error.errors(), key=lambda error: len(error["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            return Refused(400, f"the body is not JSON: {first['ctx']['error']}").response()
        place = [str(part) for part in first["loc"][1:]]
        if not place:
            return Refused(400, message).response()
        return Refused(400, f"{'.'.join(place)}: {message}", param=place[0]).response()

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        reason = error.detail
        if error.__cause__:
            reason = f"the body is no JSON in UTF-8 ({error.__cause__})"
        if error.status_code == 404:
            reason += ". There are /v1/chat/completions, /v1/completions and /v1/models"
        return Refused(error.status_code, f"{request.method} {request.url.path}: {reason}").response()

    @app.exception_handler(Exception)
    async def our_fault(request, error):
        return Refused(500, f"{type(error).__name__}: {error}", "server_error").response()
