from django.urls import include, path
from django.views.generic import TemplateView

urlpatterns = [
    path("", include("django_socketio.urls")),
    path("page/<slug:room>/", TemplateView.as_view(template_name="rooms/page.html")),
]
