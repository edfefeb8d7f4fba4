"use strict";

// Swagger UI on this server's own description.  Keys and tokens stay in memory: a reload forgets them.
const dark = matchMedia("(prefers-color-scheme: dark)");
const shade = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", shade);
shade();

const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  filter: true,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: -1,
  validatorUrl: null,
  oauth2RedirectUrl: new URL("docs/oauth2-redirect", location.href).href,
});
ui.initOAuth({ usePkceWithAuthorizationCodeGrant: true });
