"""Access tokens of an OAuth2 issuer: its keys, the checks, what its scopes open here.  Needs the extra ``oauth``."""
