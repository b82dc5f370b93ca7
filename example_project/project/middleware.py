from django.conf import settings


def content_security_policy(get_response):
    """Add the header. Django 6.0 has a middleware for this; 5.2 has not."""

    def middleware(request):
        response = get_response(request)
        response.headers.setdefault("Content-Security-Policy", settings.CONTENT_SECURITY_POLICY)
        return response

    return middleware
