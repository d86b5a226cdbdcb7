"""Who is let in, how large a request may be, how many at once, and what happens when somebody goes away."""

import os
import threading
import time

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from ray_ep.errors import ConfigError
from ray_ep.serve.http.keys import ApiKeys
from ray_ep.serve.http.server import OFF
from tests.models import build
from tests.serve.scene import serving

BODY = {"model": "tiny", "prompt": [4, 10], "temperature": 0, "max_tokens": 50}
JSON = {"content-type": "application/json"}
KEY, OTHER = "first-key-of-16-letters", "second-key-of-16-letters"


@pytest.fixture(scope="module")
def model():
    return build("mixtral")


@pytest.fixture(scope="module")
def plain(model):
    """Address of a server without keys."""
    with serving(model) as (url, _, _):
        yield url


@pytest.fixture
def gate():
    """Rounds of the engine, let through one by one."""
    rounds = threading.Semaphore(0)
    yield rounds
    rounds.release(100_000)


def until(true):
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def write(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))  # another time, on any file system
    return str(path)


def test_only_keys_of_the_file_open_and_one_that_is_taken_out_opens_no_more(model, tmp_path):
    path = tmp_path / "keys"
    with serving(model, keys=ApiKeys(write(path, f"# ours\n{KEY}\n{OTHER}\n"))) as (url, _, _):

        def models(key):
            return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0).models.list().data

        assert [len(models(key)) for key in (KEY, OTHER)] == [1, 1]
        for wrong in ("wrong-key-of-16-letters", KEY[:-1], f"{KEY}x"):
            with pytest.raises(AuthenticationError, match="no valid API key"):
                models(wrong)
        twice = [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {OTHER}")]
        assert httpx.get(f"{url}/v1/models", headers=twice).status_code == 401
        for path_of in ("/metrics", "/openapi.json", "/docs", "/v1/nothing"):
            answer = httpx.get(url + path_of)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path_of
        assert [httpx.get(url + p).status_code for p in ("/health", "/ready")] == [200, 200]
        write(path, OTHER)
        with pytest.raises(AuthenticationError):
            models(KEY)
        write(path, "short")
        with pytest.raises(AuthenticationError):
            models(OTHER)


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [("", 0o600, "expected a key a line"), ("short\n", 0o600, "expected a key a line"), (KEY, 0o644, "chmod 600")],
)
def test_a_file_of_keys_that_is_none_is_refused(tmp_path, text, mode, says):
    with pytest.raises(ConfigError, match=rf"serve\.api_key_file=.*{says}"):
        ApiKeys(write(tmp_path / "keys", text, mode))


def test_a_body_over_the_limit_is_refused_whether_its_length_is_told_or_not(model):
    with serving(model, most_bytes=1000) as (url, engine, _):
        large = b'{"prompt": "' + b"x" * 2000 + b'"}'
        for content in (large, iter([large[:700], large[700:]])):
            answer = httpx.post(f"{url}/v1/completions", content=content)
            assert answer.status_code == 413
            assert "allowed are 1000 bytes" in answer.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 2}).status_code == 200
        assert not engine.open


@pytest.mark.parametrize("path", sorted(OFF))
def test_paths_by_which_others_could_steer_the_server_are_not_there(plain, path):
    answer = httpx.post(plain + path, json={"model": "tiny"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"model": NaN}'])
def test_what_is_no_json_object_is_refused(plain, content):
    answer = httpx.post(f"{plain}/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_sent_as_a_form_is_told_so(plain):
    form = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = httpx.post(f"{plain}/v1/completions", content=b'{"model": "tiny", "prompt": "a"}', headers=form)
    assert answer.status_code == 400
    assert "expected application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("completions", b'"prompt": "\\ud800"'),
        ("completions", b'"prompt": "w4", "\\ud800": 1'),
        ("chat/completions", b'"messages": [{"role": "user", "content": "\\ud800"}]'),
    ],
)
def test_half_characters_are_refused_and_can_be_told(plain, path, more):
    content = b'{"model": "tiny", %s}' % more
    assert httpx.post(f"{plain}/v1/{path}", content=content, headers=JSON).status_code == 400


def test_more_answers_than_there_are_places_for_are_told_when_to_ask_again(model, gate):
    with serving(model, places=2, pace=gate.acquire) as (url, engine, desk):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(**BODY, n=2, stream=True)
        until(lambda: len(engine.open) == 2)
        with pytest.raises(RateLimitError, match="2 answers are under way, at most 2 may be") as e:
            client.completions.create(**BODY)
        assert int(e.value.response.headers["retry-after"]) >= 1
        gate.release(1000)
        assert sum(bool(c.choices[0].finish_reason) for c in stream) == 2
        assert desk.places.taken == 0
        assert client.completions.create(**BODY).choices[0].text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_computed_for_no_longer_and_others_go_on(model, gate, stream):
    with serving(model, pace=gate.acquire) as (url, engine, desk):
        stays, left = {}, {}

        def ask(into, **more):
            try:
                into["text"] = httpx.post(f"{url}/v1/completions", json=BODY | more, timeout=120).json()
            except httpx.TimeoutException:
                into["gone"] = True

        other = threading.Thread(target=ask, args=(stays,), kwargs={"max_tokens": 20})
        other.start()
        until(lambda: len(engine.open) == 1)
        with httpx.Client(timeout=120) as client:
            if stream:
                with client.stream("POST", f"{url}/v1/completions", json=BODY | {"stream": True}) as answer:
                    until(lambda: len(engine.open) == 2 or gate.release())
                    gate.release(2)
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.TimeoutException):
                    client.post(f"{url}/v1/completions", json=BODY, timeout=httpx.Timeout(120, read=1))
        until(lambda: engine.cancelled or gate.release())
        until(lambda: len(engine.open) <= 1)
        gate.release(1000)
        other.join(120)
        assert len(engine.cancelled) == 1
        assert stays["text"]["choices"][0]["finish_reason"] in ("stop", "length")
        until(lambda: desk.places.taken == 0)
        assert not left


def test_after_the_loss_of_ranks_open_answers_fail_and_health_says_so(model, gate):
    with serving(model, pace=gate.acquire) as (url, engine, desk):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(**BODY, stream=True)
        gate.release(2)
        next(iter(stream))
        engine.break_down("rank 1 died")
        gate.release(1000)
        with pytest.raises(Exception, match="rank 1 died"):
            list(stream)
        assert httpx.get(f"{url}/health").status_code == 503
        ready = httpx.get(f"{url}/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "rank 1 died")
        answer = httpx.post(f"{url}/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "rank 1 died")
        assert desk.places.taken == 0


def test_a_server_that_is_stopping_takes_nothing_in(model):
    with serving(model) as (url, _, desk):
        desk.open = False
        assert httpx.post(f"{url}/v1/completions", json=BODY).status_code == 503
        assert httpx.get(f"{url}/ready").status_code == 503
        assert httpx.get(f"{url}/health").status_code == 200


def test_figures_have_opentelemetrys_names(model):
    with serving(model) as (url, _, _):
        answer = httpx.post(f"{url}/v1/completions", json=BODY | {"max_tokens": 5}).json()
        httpx.post(f"{url}/v1/completions", json=BODY | {"prompt": [64]})
        text = httpx.get(f"{url}/metrics").text
    about = 'gen_ai_operation_name="text_completion",gen_ai_provider_name="ray_ep",gen_ai_request_model="tiny"'
    tokens = answer["usage"]["completion_tokens"]
    lines = text.splitlines()
    assert f"gen_ai_server_time_to_first_token_seconds_count{{{about}}} 1.0" in lines
    assert f"gen_ai_server_time_per_output_token_seconds_count{{{about}}} 1.0" in lines
    assert f"gen_ai_server_request_duration_seconds_count{{{about}}} 1.0" in lines
    assert f'gen_ai_client_token_usage_sum{{{about},gen_ai_token_type="output"}} {float(tokens)}' in lines
    assert f'gen_ai_client_token_usage_sum{{{about},gen_ai_token_type="input"}} 2.0' in lines
    assert 'ep_serve_rank_cache_utilization{rank="0"} 0.0' in lines
    assert "ep_serve_answers_limit 8.0" in lines
