def who(get_response):
    """Ask the database who is there before the view."""

    def middleware(request):
        request.user.get_username()
        return get_response(request)

    return middleware
