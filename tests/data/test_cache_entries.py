"""Which cache is where: `text_embeds` and `image_embeds` entries, and the datasets that name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.data.cache_place import BucketPlace, LocalPlace
from simpletuner.errors import ConfigError

pytest.importorskip("boto3")
HERE = {"id": "set", "instance_data_dir": "."}
TWO = {**HERE, "id": "two"}
PICTURES = {**HERE, "id": "pictures", "instance_data_dir": "pictures"}
TEXTS = {"id": "texts", "dataset_type": "text_embeds"}
LATENTS = {"id": "latents", "dataset_type": "image_embeds"}
# Nobody listens there, so that whoever checks places says so.
S3 = {"type": "aws", "aws_bucket_name": "caches", "aws_endpoint_url": "http://127.0.0.1:9", "aws_region_name": "x"}


@pytest.fixture(autouse=True)
def unreachable_places_are_no_matter(monkeypatch) -> None:
    monkeypatch.setattr(BucketPlace, "missing", lambda self: None)


def problems(plan_of, *entries) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(*entries)
    return caught.value.message


def test_each_datasets_embeddings_go_where_it_says_and_all_else_to_the_default(plan_of):
    first, second = {**TEXTS, "cache_dir": "one"}, {**TEXTS, "id": "other", "cache_dir": "else", "default": True}

    plan = plan_of({**HERE, "text_embeds": "texts"}, TWO, first, second)

    assert [str(dataset.text_place) for dataset in plan.datasets] == ["one", "else"]
    assert str(plan.text_place) == "else" and plan.notes == ()
    assert plan.describe()[2:] == ["text embeddings in else", "text embeddings of set in one"]
    assert [str(place) for place in plan.cache_places] == ["cache/vae/auraflow/set", "cache/vae/auraflow/two", "one", "else"]


def test_a_local_image_embeds_entry_gives_each_dataset_a_folder_in_its_own(plan_of):
    plan = plan_of({**HERE, "image_embeds": "latents"}, {**TWO, "image_embeds": "latents", "cache_dir_vae": "own"}, {**LATENTS, "cache_dir": "kept/"})

    assert [str(dataset.latents_place) for dataset in plan.datasets] == ["kept/set", "own"]
    usual = plan_of({**HERE, "image_embeds": "latents"}, LATENTS)
    assert usual.datasets[0].latents_place == LocalPlace(Path("cache/vae/auraflow/set"))


def test_caches_in_a_bucket_are_below_its_prefix_with_a_workplace_in_cache_dir(plan_of):
    latents, texts = {**LATENTS, **S3, "aws_data_prefix": "/run/", "shard_cache_gb": 2}, {**TEXTS, **S3, "cache_dir": "words"}

    plan = plan_of(
        {**HERE, "image_embeds": "latents"}, {**TWO, "image_embeds": "latents", "cache_dir_vae": "/own/"}, latents, texts, cache_dir="kept"
    )

    one, two = (dataset.latents_place for dataset in plan.datasets)
    assert str(one) == "s3://caches/run/vae/auraflow/set at http://127.0.0.1:9" and str(two).startswith("s3://caches/run/own at ")
    assert str(plan.text_place) == "s3://caches/words at http://127.0.0.1:9"
    assert isinstance(one, BucketPlace) and isinstance(two, BucketPlace) and isinstance(plan.text_place, BucketPlace)
    assert one.root == two.root != plan.text_place.root and one.root.parent == Path("kept/buckets") and one.copies_bytes == 2e9
    assert len({place.workplace for place in (one, two, plan.text_place)}) == 3


def test_secrets_of_a_cache_are_in_no_text_that_a_plan_can_show(plan_of):
    plan = plan_of(HERE, {**TEXTS, **S3, "aws_access_key_id": "key-id-9", "aws_secret_access_key": "hunter2"})

    assert not any(secret in text for secret in ("hunter2", "key-id-9") for text in (repr(plan), *plan.describe(), *map(str, plan.cache_places)))


def test_entries_that_no_dataset_names_are_said(plan_of):
    plan = plan_of(HERE, TEXTS, {**TEXTS, "id": "idle"}, LATENTS)

    assert plan.notes == (
        "dataset 'idle': without effect: no dataset names it in text_embeds",
        "dataset 'latents': without effect: no dataset names it in image_embeds",
    )


@pytest.mark.parametrize(
    ("keys", "entry", "problem"),
    [
        ({"image_embeds": "latens"}, LATENTS, "dataset 'set': image_embeds is 'latens'; did you mean 'latents'?"),
        ({"image_embeds": "latents"}, {**LATENTS, "disabled": True}, "dataset 'set': image_embeds is 'latents', which is disabled"),
        ({"text_embeds": "texts"}, {**TEXTS, "disabled": True}, "dataset 'set': text_embeds is 'texts', which is disabled"),
        ({}, {**TEXTS, "type": "memory"}, "dataset 'texts': type is 'memory'; caches are kept in a folder, 'local', or in a bucket, 'aws'"),
        ({}, {**LATENTS, "type": "aws"}, "dataset 'latents': aws_bucket_name is needed"),
        ({}, {**LATENTS, **S3, "shard_cache_gb": -1}, "dataset 'latents': shard_cache_gb is -1; it must be 0 or more"),
        ({}, {**LATENTS, **S3, "cache_dir": "a/../../b"}, "cache_dir is 'a/../../b', which leads out of the bucket's folder"),
        ({}, {**TEXTS, **S3, "cache_dir": "/"}, "dataset 'texts': cache_dir is '/', which names no folder: give a name below aws_data_prefix"),
        ({}, {**LATENTS, **S3, "cache_dir": "./"}, "cache_dir is './', which names no folder"),
        ({"image_embeds": "latents", "cache_dir_vae": "/"}, {**LATENTS, **S3}, "cache_dir_vae is '/', which names no folder"),
        ({"image_embeds": "latents", "cache_dir_vae": ".."}, {**LATENTS, **S3}, "cache_dir_vae is '..', which leads out of the bucket's folder"),
        ({}, {**LATENTS, **S3, "aws_secret_access_key": "778899"}, "aws_access_key_id and aws_secret_access_key go together"),
        ({}, {**LATENTS, "cache_dirr": "x"}, "dataset 'latents': unknown key 'cache_dirr'; did you mean 'cache_dir'?"),
    ],
)
def test_entries_that_cannot_be_are_refused_with_their_rule(plan_of, keys, entry, problem):
    message = problems(plan_of, {**HERE, **keys}, entry)

    assert problem in message and "778899" not in message


def test_two_datasets_cannot_share_a_folder_in_a_bucket(plan_of):
    keys = {"image_embeds": "latents", "cache_dir_vae": "same"}

    assert "datasets 'set' and 'two' have the same cache_dir_vae s3://caches/same" in problems(
        plan_of, {**HERE, **keys}, {**TWO, **keys}, {**LATENTS, **S3}
    )


@pytest.mark.parametrize(
    "entries",
    [
        [{**PICTURES, "cache_dir_vae": "pictures/../pictures"}],
        [{**PICTURES, "image_embeds": "latents"}, {"id": "latents", "dataset_type": "image_embeds", "cache_dir": "."}],
        [PICTURES, {**TEXTS, "cache_dir": "linked"}],
        [PICTURES, {**PICTURES, "id": "two", "instance_data_dir": "more", "cache_dir_vae": "pictures"}],
    ],
    ids=["latents", "latents in a folder named as the dataset", "texts through a link", "another dataset's latents"],
)
def test_nothing_is_cached_among_pictures(plan_of, workplace, entries):
    for name in ("pictures", "more"):
        (workplace / name).mkdir()
    (workplace / "linked").symlink_to("pictures")

    message = problems(plan_of, *entries)

    assert "would be cached in pictures, where the pictures of 'pictures' lie" in message and message.count("would be cached") == 1
    assert plan_of({**PICTURES, "cache_dir_vae": "pictures/cache"}).datasets


def test_nothing_is_cached_in_a_bucket_among_pictures(plan_of):
    pictures = {"id": "set", **S3, "aws_data_prefix": "run/pictures", "image_embeds": "latents", "cache_dir_vae": "pictures"}

    assert "would be cached in s3://caches/run/pictures/ at http://127.0.0.1:9, where the pictures of 'set' lie" in problems(
        plan_of, pictures, {**LATENTS, **S3, "aws_data_prefix": "run"}
    )
