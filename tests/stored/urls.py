from django.contrib.auth import login
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.urls import include, path


def enter(request):
    """Log somebody in."""
    login(request, User.objects.get_or_create(username="alice")[0])
    request.session["colour"] = "green"
    return HttpResponse("welcome")


urlpatterns = [path("enter/", enter), path("", include("django_socketio.urls"))]
