"""As much of a web framework as the API needs."""


class HTTPException(Exception):  # noqa: N818 - the framework's name
    """An answer that is raised."""


class Response:
    """An answer."""

    def __init__(self, *, body=None, status=200, headers=None):
        self.body, self.status, self.headers = body, status, headers or {}


def json_response(data, *, status=200, headers=None):
    return Response(body=data, status=status, headers=headers)


class Router:
    """Routes of GET requests by path."""

    def __init__(self):
        self.get = {}

    def add_get(self, path, handler):
        self.get[path] = handler


class Application:
    """What routes belong to."""

    def __init__(self):
        self.router = Router()
