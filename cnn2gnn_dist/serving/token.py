"""The token that edits of the memory require."""

from __future__ import annotations

import os
from pathlib import Path

from cnn2gnn_dist.errors import UserError

VARIABLE = "CNN2GNN_TOKEN"
SHORTEST = 16


def read_token(file: str | None) -> str | None:
    """The token from the first line of a file, or from the environment; None if there is neither.

    Raises:
        UserError: the file can't be read; the token is too short or has spaces.
    """
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"the token can't be read: {error}", where=file, remedy="name a readable text file"
            ) from None
        token, where = (lines[0].strip() if lines else ""), file
    elif VARIABLE in os.environ:
        token, where = os.environ[VARIABLE].strip(), VARIABLE
    else:
        return None
    if len(token) < SHORTEST or not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"a token has at least {SHORTEST} ASCII characters and no spaces",
            where=where,
            remedy="python -c 'import secrets; print(secrets.token_urlsafe())' > FILE",
        )
    return token
