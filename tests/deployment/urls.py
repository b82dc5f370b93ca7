import json

from asgiref.sync import sync_to_async
from django.http import JsonResponse
from django.urls import include, path

from tests.deployment import gauges
from tests.deployment.sender import attempt


def view(request):
    return JsonResponse(attempt(*json.loads(request.GET["call"])), safe=False)


async def async_view(request):
    outcome = await sync_to_async(attempt)(*json.loads(request.GET["call"]))
    return JsonResponse(outcome, safe=False)


urlpatterns = [
    path("gauges/", gauges.view),
    path("call/", view),
    path("async-call/", async_view),
    path("", include("django_socketio.urls")),
]
