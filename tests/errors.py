"""The message of an error that must come."""

import pytest

from jaxdistill.errors import UserError


def error_of(function, *args, **kwargs) -> str:
    """Gives the message of the UserError that a call must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
