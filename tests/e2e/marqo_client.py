"""What a user of Marqo's client does, in that client's own Python: writes what came back, as JSON.

marqo_client.py URL KEY MODEL [DEVICE]: DEVICE where this client's `eject_model` takes one. It imports
nothing of ours: no Python but the client's own ever runs it.
"""

import json
import sys

import marqo
from marqo.errors import MarqoWebError


def tried(call, *args):
    try:
        return {"said": call(*args)}
    except MarqoWebError as error:
        told = error.message if isinstance(error.message, dict) else {"text": error.message}
        return {"code": error.code, "type": error.error_type, "status": error.status_code} | told


def main(url, key, model, *device):
    index = marqo.Client(url, api_key=key, return_telemetry=True).index("any")
    found = {
        "loaded": tried(index.get_loaded_models),
        "cpu": tried(index.get_cpu_info),
        "cuda": tried(index.get_cuda_info),
        "ejected": tried(index.eject_model, model, *device),
        "again": tried(index.eject_model, model, *device),
        "unknown": tried(index.eject_model, model[:-1], *device),
        "left": tried(index.get_loaded_models),
    }
    stranger = marqo.Client(url, api_key="wrong").index("any")
    found["stranger"] = tried(stranger.get_loaded_models)
    sys.stdout.write(json.dumps(found))


main(*sys.argv[1:])
