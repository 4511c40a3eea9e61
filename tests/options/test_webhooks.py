from __future__ import annotations

import json

import pytest

from simpletuner.options.load import load_config
from simpletuner.options.sources import Setting
from simpletuner.options.webhooks import read_webhooks
from tests.options.test_load import FAMILY, load, refusal

SECRET = "https://discord.com/api/webhooks/123/T0PSECRET"
DISCORD = {"webhook_type": "discord", "webhook_url": SECRET}
RAW = {"webhook_type": "raw", "callback_url": "http://127.0.0.1:8/x", "auth_token": "T0PSECRET"}


def test_an_object_a_list_and_a_file_are_read_alike(tmp_path):
    file = tmp_path / "hooks.json"
    file.write_text(json.dumps([DISCORD, RAW]))

    (discord, raw), problems = read_webhooks(file)

    assert problems == () and read_webhooks([DISCORD, RAW])[0] == (discord, raw) and read_webhooks(DISCORD)[0] == (discord,)
    assert (discord.name, raw.name, raw.token) == ("discord discord.com", "raw 127.0.0.1", "T0PSECRET")
    assert "T0PSECRET" not in repr([discord, raw])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"webhook_type": "discrd", "webhook_url": SECRET}, "did you mean 'discord'?"),
        ({"webhook_url": SECRET}, "has no webhook_type"),
        ({**DISCORD, "loglevel": "info"}, "loglevel is no key of webhook_type discord; did you mean 'log_level'?"),
        ({**DISCORD, "log_level": "warn"}, "did you mean 'warning'?"),
        ({**DISCORD, "auth_token": "T0PSECRET"}, "auth_token is no key of webhook_type discord"),
        ({"webhook_type": "discord"}, "webhook_url is not set"),
        ({**RAW, "callback_url": "ftp://T0PSECRET/"}, "callback_url is no address such as"),
        ({**RAW, "callback_url": "http://a:b/T0PSECRET"}, "callback_url is no address such as"),
        ({**RAW, "callback_url": "{env:T0PSECRET_URL}"}, "{env:NAME} is replaced in config.json alone"),
        ({**RAW, "auth_token": "T0PSECRET\n"}, "auth_token must be a text"),
        ({**RAW, "ssl_no_verify": "yes"}, "ssl_no_verify 'yes' is not true or false"),
        ("http://127.0.0.1/T0PSECRET", "is an address: write"),
        ([RAW, 3], "webhook_config, entry 2 is no object"),
    ],
)
def test_what_is_wrong_with_a_webhook_is_said_without_its_secrets(entry, said):
    hooks, problems = read_webhooks(entry)

    assert len(hooks) == isinstance(entry, list) and said in problems[0]
    assert "T0PSECRET" not in problems[0].replace("T0PSECRET_URL", "")


def test_wrong_webhooks_are_found_with_everything_else_and_no_message_shows_a_secret(tmp_path):
    message = refusal({**FAMILY, "train_batch_size": "two", "webhook_config": {**RAW, "log_level": "loud"}})

    assert "train_batch_size 'two'" in message and "log_level 'loud'" in message and "T0PSECRET" not in message
    assert "webhook_config: " in refusal({**FAMILY, "webhook_config": str(tmp_path / "none.json")})
    assert "T0PSECRET" not in refusal({**FAMILY, "webhook_config": json.dumps([DISCORD, 3])})
    assert "not set" in refusal({**FAMILY, "webhook_config": {**RAW, "auth_token": "{env:NOT_THERE}"}})
    broken = tmp_path / "broken.json"
    broken.write_text('{"webhook_type": "raw", "callback_url": "T0PSECRET"')
    said = refusal({**FAMILY, "webhook_config": str(broken)})
    assert "broken.json" in said and "T0PSECRET" not in said


def test_webhooks_of_a_flag_or_the_environment_are_read_and_their_note_shows_none():
    settings = [*(Setting(key, value, "config.json") for key, value in {**FAMILY, "webhook_config": RAW}.items())]
    settings.append(Setting("webhook_config", json.dumps(DISCORD), "environment WEBHOOK_CONFIG"))

    loaded = load_config(settings, lambda *facts: {})

    assert [hook.kind for hook in loaded.config.reporting.webhooks()] == ["discord"]
    assert any("webhook_config (not shown) is taken from environment" in note for note in loaded.notes)
    assert "T0PSECRET" not in str(loaded.notes)


def test_a_secret_may_stand_in_the_environment_and_saved_settings_hold_none():
    config = load({**FAMILY, "webhook_config": {**RAW, "auth_token": "{env:MY_TOKEN}"}}, environ={"MY_TOKEN": "T0PSECRET"}).config

    assert config.reporting.webhooks()[0].token == "T0PSECRET"
    assert config.flat()["webhook_config"] is None and "T0PSECRET" not in json.dumps(config.flat())
