"""What Triton's API says beside inference, for HTTP and gRPC alike.

Each module answers with plain dicts that are protobuf's JSON of the reply (their field names): the HTTP
face writes them as they are, the gRPC face makes messages of them. Errors are those of the repository
and the door; nothing here knows a status code.
"""
