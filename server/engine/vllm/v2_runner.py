"""placeholder"""


def patch() -> None:
    return None
