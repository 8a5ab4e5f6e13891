// Every address is relative, so that the page works behind a path prefix too.
window.ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  deepLinking: true,
  defaultModelsExpandDepth: -1, // 400 schemas, all reachable from their routes
  displayRequestDuration: true,
  docExpansion: "list",
  persistAuthorization: true,
  tryItOutEnabled: true,
  validatorUrl: null, // no request leaves this server
});
