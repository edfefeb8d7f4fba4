"use strict";

// The issuer has sent the browser back here, in the window that Swagger UI opened (RFC 6749 4.1.2): give it the code.
const pending = window.opener && window.opener.swaggerUIRedirectOauth2;
const given = new URLSearchParams(location.search);

if (!pending) {
  document.getElementById("said").textContent = "This page ends a sign-in that was begun in /docs; there is none.";
} else {
  const { auth, callback, errCb, redirectUrl, state } = pending;
  const code = given.get("code");
  if (given.get("state") !== state) {
    // Not the answer to what was asked: someone else's code must not become this visitor's token.
    errCb({ authId: auth.name, source: "auth", level: "error", message: "The issuer's answer has another state." });
  } else if (!code) {
    const words = [given.get("error"), given.get("error_description")].filter(Boolean).join(": ");
    errCb({ authId: auth.name, source: "auth", level: "error", message: words || "The issuer sent no code." });
  } else {
    delete pending.state;
    auth.code = code;
    callback({ auth, redirectUrl });
  }
  window.close();
}
