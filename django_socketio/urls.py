from django.urls import path

from . import views

urlpatterns = [
    path("socket.io/", views.socketio, name="socketio"),
    path("socket.io/health", views.health, name="socketio-health"),
]
