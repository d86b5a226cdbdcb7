"""Whatever fits the OpenAPI description, and whatever does not: no request makes the server fail."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai.types.chat import ChatCompletion
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from ray_ep.serve.http.keys import ApiKeys
from tests.models import build
from tests.serve.scene import serving

CHECKS = [
    not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance,
    negative_data_rejection,
]  # fmt: skip
KEY = "one-key-of-24-characters"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server that asks for a key."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(KEY)
    path.chmod(0o600)
    with serving(build("mixtral"), keys=ApiKeys(str(path)), context=24) as (url, _, _):
        yield url


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models"])
def test_no_request_makes_the_server_fail(server, path, mode):
    headers = {"Authorization": f"Bearer {KEY}"}
    tree = httpx.get(f"{server}/openapi.json", headers=headers).json()
    schema = schemathesis.openapi.from_dict(tree)
    schema.config.update(base_url=server)
    operation = schema[path]["GET" if path == "/v1/models" else "POST"]
    statuses = set()

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        statuses.add(case.call_and_validate(checks=CHECKS, headers=headers, timeout=120).status_code)

    ask()
    assert statuses <= {200, 400, 401, 404, 405, 429}
    assert (200 if mode is GenerationMode.POSITIVE else 400) in statuses or path == "/v1/models"


def test_the_description_tells_bodies_errors_and_keys(server):
    tree = httpx.get(f"{server}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    post = tree["paths"]["/v1/chat/completions"]["post"]
    assert set(post["responses"]) == {"200", "400", "401", "404", "413", "429", "503"}
    body = tree["components"]["schemas"]["ChatBody"]
    assert body["properties"]["model"] == {"type": "string", "enum": ["tiny"]}
    assert body["required"] == ["model", "messages"]
    assert set(tree["components"]["schemas"]["ChatCompletion"]["required"]) <= set(ChatCompletion.model_fields)
    assert "security" in tree["paths"]["/metrics"]["get"]
    assert "security" not in tree["paths"]["/health"]["get"]
