from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sqlalchemy import insert, select

import luthier
from luthier import owners, tuned
from luthier.bases import Entry, enter
from luthier.errors import GateRefused, NotFound, StoreError
from luthier.schema.jobs import JOBS
from luthier.serving.router import Router
from luthier.store import ReleaseRecord, Store
from tests.serving.make_home import World, copy_home, promote, publish, publish_release


@pytest.fixture
def router(world: World) -> Router:
    return Router(world.store, world.home)


def test_a_name_an_alias_and_a_digest_lead_to_the_same_release(world: World, router: Router) -> None:
    first = world.releases[0]
    targets = {
        router.resolve(model)
        for model in ("guard", "guard@production", f"guard@{first[:12]}", f"guard@{first}")
    }
    assert [target.release_digest for target in targets] == [first]


def test_an_alias_moved_through_another_store_is_followed_at_once(world: World, router: Router) -> None:
    elsewhere = Store.open(world.home.path)
    for digest in world.releases * 2:
        promote(elsewhere, digest, "canary")
        assert router.resolve("guard@canary").release_digest == digest


@pytest.mark.parametrize(
    "model",
    [
        "",
        "gaurd",
        "guard@prodution",
        "guard@",
        "guard@0123456789ab",
        "guard@@",
        "../guard",
        "guard@\x00",
        "G" * 99,
    ],
)
def test_an_unknown_model_is_not_found(router: Router, model: str) -> None:
    with pytest.raises(NotFound):
        router.resolve(model)


def test_the_nearest_name_is_offered(router: Router) -> None:
    with pytest.raises(NotFound, match="did you mean 'guard@production'"):
        router.resolve("guard@prodution")


def test_a_release_that_its_gates_refused_is_not_served(world: World, router: Router, tmp_path: Path) -> None:
    refused = publish_release(world.home, world.store, world.model, tmp_path, seed=90, accepted=False)
    with pytest.raises(GateRefused):
        router.resolve(f"guard@{refused[:12]}")
    assert not any(refused in entry.model for entry in router.listed())


def test_an_adapter_of_another_base_is_refused(world: World, router: Router, tmp_path: Path) -> None:
    wrong = publish_release(
        world.home, world.store, world.model, tmp_path, seed=91, trained_on="luthier-base:000000000000"
    )
    with pytest.raises(StoreError, match="was trained on 'luthier-base:000000000000'"):
        router.resolve(f"guard@{wrong[:12]}")


def test_a_release_made_on_another_base_is_refused(world: World, router: Router, tmp_path: Path) -> None:
    wrong = publish_release(world.home, world.store, world.model, tmp_path, seed=92, base="0" * 64)
    with pytest.raises(StoreError, match="but its model artefact holds base"):
        router.resolve(f"guard@{wrong[:12]}")


@pytest.mark.parametrize("place", ["adapter/adapter_model.safetensors", "release.json"])
def test_a_flipped_bit_is_found_before_a_release_is_first_served(
    world: World, tmp_path: Path, place: str
) -> None:
    copy = copy_home(world, tmp_path / "home")
    path = copy.home.artifact(copy.releases[0]) / place
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="SHA-256 changed"):
        Router(copy.store, copy.home).resolve("guard")


def test_a_file_that_vanishes_later_is_found_too(world: World, tmp_path: Path) -> None:
    copy = copy_home(world, tmp_path / "home")
    router = Router(copy.store, copy.home)
    router.resolve("guard")
    (copy.home.artifact(copy.model) / "base" / "model.safetensors").unlink()
    with pytest.raises(StoreError, match="missing base/model"):
        router.resolve("guard")


def test_every_alias_and_every_accepted_digest_is_listed(world: World, router: Router) -> None:
    listed = {entry.model: entry.digest for entry in router.listed()}
    assert listed["guard@production"] == world.releases[0]
    assert all(listed[f"guard@{digest}"] == digest for digest in world.releases)
    assert all(
        router.resolve(model).release_digest == digest
        for model, digest in listed.items()
        if digest in world.releases
    )


def test_a_bases_name_is_answered_by_the_base_alone(world: World, tmp_path: Path) -> None:
    copy = copy_home(world, tmp_path / "home")
    router = Router(copy.store, copy.home)
    digest = router.resolve("guard").base_digest
    enter(copy.store, Entry("Tiny", {}, copy.model, digest, {}), "test")
    for tenant in (None, "local", "someone"):
        target = router.resolve("Tiny", tenant)
        assert (target.name, target.adapter_digest, target.adapter_dir) == ("Tiny", None, None)
        assert target.release_digest == target.base_digest == digest
        assert "Tiny" in [entry.model for entry in router.listed(tenant)]
    assert "".join(luthier.chat("Tiny", ["hello"], max_tokens=3, home=copy.home.path)).endswith("\n")
    with pytest.raises(NotFound, match="did you mean 'Tiny'"):
        "".join(luthier.chat("Tyny", ["hello"], home=copy.home.path))
    enter(copy.store, Entry("Wrong", {}, copy.model, "0" * 64, {}), "test")
    with pytest.raises(StoreError, match="does not hold base"):
        router.resolve("Wrong")


def test_a_release_of_another_tenant_is_not_found_until_it_is_shared(world: World, tmp_path: Path) -> None:
    copy = copy_home(world, tmp_path / "home")
    router = Router(copy.store, copy.home)
    names = ("guard", "guard@production", f"guard@{copy.releases[0]}")
    for model in names:
        assert router.resolve(model, "local") == router.resolve(model)
        with pytest.raises(NotFound) as foreign:
            router.resolve(model, "someone")
        with pytest.raises(NotFound) as unknown:
            router.resolve(model.replace("guard", "gourd"), "someone")
        assert str(foreign.value) == str(unknown.value).replace("gourd", "guard")
        with pytest.raises(NotFound):
            router.entry(model, "someone")
    assert router.listed("someone") == []
    owners.share(copy.store, "guard", actor="test")
    assert [router.resolve(model, "someone").release_digest for model in names] == [copy.releases[0]] * 3
    assert router.listed("someone") == router.listed("local")
    owners.share(copy.store, "guard", actor="test", on=False)
    with pytest.raises(NotFound):
        router.resolve("guard", "someone")
    with pytest.raises(NotFound, match="did you mean 'guard'"):
        owners.share(copy.store, "gard", actor="test")


def tune(world: World, tenant: str, name: str, **more: object) -> None:
    """A job's row and its model's, as a job that succeeded leaves them; the release is one of the world's."""
    job = {column.name: 0 for column in JOBS.c if column.name != "seq"} | {
        "id": "ftjob-1", "tenant": tenant, "base": "tiny", "model": "ft:tiny:org::1", "asked": "{}",
        "section": "{}", "status": "succeeded", "training_file": "f", "training_sha256": "",
    }  # fmt: skip
    with world.store.writing() as connection:
        if not connection.execute(select(JOBS.c.id)).all():
            connection.execute(insert(JOBS), job)
        made = tuned.Tuned(name, tenant, "ftjob-1", "tiny", "ftjob-1", world.releases[1], **more)  # type: ignore[arg-type]
        tuned.add(connection, [made])


def test_a_tuned_model_answers_to_its_own_tenant_until_it_is_deleted(world: World, tmp_path: Path) -> None:
    copy = copy_home(world, tmp_path / "home")
    router = Router(copy.store, copy.home)
    kept = tmp_path / "train"
    shutil.copytree(
        copy.home.artifact(copy.releases[2]) / "adapter", kept / "checkpoints" / "step-4" / "adapter"
    )
    artefact = publish(copy.home, kept)
    copy.store.add_release(ReleaseRecord(copy.releases[1], "ftjob-1", None, True, {}))
    name, step = "ft:tiny:org:mine:1", "ft:tiny:org:mine:1:ckpt-step-4"
    tune(copy, "a", name)
    tune(copy, "a", step, artefact=artefact, step=4)

    assert router.resolve(name, "a").release_digest == copy.releases[1]
    other = router.resolve(f"guard@{copy.releases[2]}")
    target = router.resolve(step, "a")
    assert (target.base_digest, target.adapter_digest) == (other.base_digest, other.adapter_digest)
    assert target.release_digest == artefact and target.adapter_dir and target.adapter_dir.is_dir()
    assert [entry.model for entry in router.listed("a")] == [name, step]
    assert router.entry(step, "a").owner == "a"
    for model in (name, step, f"ftjob-1@{copy.releases[1]}"):
        for stranger in ("b", "local"):
            for act in (router.resolve, router.entry, router.withdraw):
                with pytest.raises(NotFound):
                    act(model, stranger)
    with pytest.raises(NotFound):
        router.withdraw("guard", "local")
    router.withdraw(step, "a")
    assert [entry.model for entry in router.listed("a")] == [name]
    by_its_job = f"ftjob-1@{copy.releases[1]}"
    assert router.resolve(by_its_job, "a").release_digest == copy.releases[1]
    router.withdraw(name, "a")
    for model in (name, by_its_job):
        with pytest.raises(NotFound, match="nothing is released here yet"):
            router.resolve(model, "a")
    assert router.resolve(by_its_job).release_digest == copy.releases[1]  # the machine's own command line
    assert copy.home.artifact(artefact).is_dir()
