import logging
from io import BytesIO
from typing import Any

from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe

from . import api, runtime
from .identities import identify_handshake

logger = logging.getLogger(__name__)

_NO_SERVER = (
    "Socket.IO is not served here: this process runs Django alone. Start `manage.py"
    " runserver_socketio` and send this path to it."
)


# Origins are checked for every request, safe methods included, which Django's CSRF check is not.
@csrf_exempt
def socketio(request: HttpRequest) -> HttpResponse:
    """
    Open a session: the one request of it that passes the middleware.

    It ends here like any other; the handlers keep it for what it says of the user.
    """
    engine = runtime.get_engine(request.META)
    if engine is None:
        return HttpResponse(_NO_SERVER, status=503, content_type="text/plain")
    if "%" in request.META["QUERY_STRING"] and "sid" in request.GET:
        # Spelled so that the server did not see it: a poll would wait inside of the middleware.
        return HttpResponse("sid is to be spelled plainly", status=400, content_type="text/plain")
    try:
        identify_handshake(request)
    except DatabaseError as error:
        logger.error("Nobody can say who asks for a session: %s", error)
        return HttpResponse("try again", status=503, content_type="text/plain")
    answer = engine.handle(request.META, request)
    _let_go(request)
    response = HttpResponse(answer.body, status=answer.status.value)
    if answer.body:
        response["Content-Length"] = str(len(answer.body))
    else:
        del response["Content-Type"]
    for name, value in answer.headers:
        response[name] = value
    return response


@require_safe
@never_cache
def health(request: HttpRequest) -> HttpResponse:
    """Answer 200, or 503 while this worker is deaf or stopping, for load balancers to ask."""
    state = api.health()
    return JsonResponse(state, status=200 if state["ok"] else 503)


def _let_go(request: Any) -> None:
    """Cut the request off its connection, which it would keep alive as long as itself."""
    request.META.pop("wsgi.input", None)
    request._stream = _EMPTY
    request._read_started = False
    request._body = b""


_EMPTY = BytesIO()
