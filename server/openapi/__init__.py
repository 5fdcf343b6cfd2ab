"""One OpenAPI 3.1 document for all faces, and the page that shows it.

operation    what one call of a face takes and answers, as data
failures     an example of each error, as the server itself would write it
document     the operations of all faces → the document
pages        GET /openapi.json, GET /docs
native, v2, ... the calls of each face

A test holds the document against the routes that the app has: neither may know one that the other
does not.
"""
