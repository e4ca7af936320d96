"""Who is asking: tokens in, principals out.

``transport`` finds the token in a request and judges its origin, ``jwt`` verifies JSON Web Tokens, ``api_keys`` keeps API keys
as hashes in a file, ``authenticator`` decides between them. A token never appears in a message or in the log.
"""

from kimera_stream.api.auth.api_keys import ApiKey, ApiKeyStore, add_api_key, create_api_key, revoke_api_key
from kimera_stream.api.auth.authenticator import ANONYMOUS, TokenAuthenticator
from kimera_stream.api.auth.transport import extract_token, host_allowed, origin_allowed, split_subprotocols

__all__ = [
    "ANONYMOUS",
    "ApiKey",
    "ApiKeyStore",
    "TokenAuthenticator",
    "add_api_key",
    "create_api_key",
    "extract_token",
    "host_allowed",
    "origin_allowed",
    "revoke_api_key",
    "split_subprotocols",
]
