"""The deployment with users: its URLs where ROOT_URLCONF names this module."""

import json

from django.contrib.auth import authenticate, login, logout
from django.http import HttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from tests.deployment.urls import urlpatterns as urls_without_users


@csrf_exempt
def log_in(request):
    login(request, authenticate(request, **json.loads(request.body)))
    return HttpResponse()


@csrf_exempt
def log_out(request):
    logout(request)
    return HttpResponse()


urlpatterns = [path("login/", log_in), path("logout/", log_out), *urls_without_users]
