"""Work directories that are not local: a run in a bucket is the run that it is on a disk."""

import pytest
from bucket import Bucket
from runs import Crash, act_in_step, command, fails, files_of

from alignjax import convert, report, train
from alignjax.machine import workdir


@pytest.fixture
def bucket(monkeypatch):
    found = Bucket()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, found.url)
    monkeypatch.setenv(
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # else it asks Google what kind of bucket it is
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # TensorStore's
    yield found
    found.shutdown()


def test_a_run_in_a_bucket_resumes_and_ends_as_one_on_disk(
    bucket, chain, tmp_path, monkeypatch, capsys
):
    """Cut off after its first checkpoint, when nothing more reaches the bucket."""
    asked = ["--config", "lm.py:tiny", "--workdir", "gs://bucket/runs/lm-tiny"]

    def cut():
        monkeypatch.setattr(workdir, "publish", lambda *_: None)
        raise Crash

    with monkeypatch.context() as monkeypatch, act_in_step(3, cut):
        with pytest.raises(Crash):
            train.main(asked)
    assert bucket.objects["runs/lm-tiny/metrics.jsonl"][1].count(b"\n") == 2
    assert train.main(asked) == 0
    assert "lm-tiny: goes on from step 2" in capsys.readouterr().out
    assert report.main(["gs://bucket/runs/lm-tiny"]) == 0
    assert report.main(["gs://bucket/runs/lm-tiny", "--out", str(tmp_path / "report.html")]) == 0
    assert bucket.objects["runs/lm-tiny/report.html"][1] == (tmp_path / "report.html").read_bytes()
    bucket.download(tmp_path)
    run = tmp_path / "runs" / "lm-tiny"
    assert files_of(run) == files_of(chain[0] / "lm-tiny")
    assert len(list((run / "tensorboard").iterdir())) == 2
    for where, out in (("gs://bucket/runs", "theirs"), (chain[0], "ours")):
        assert convert.main(["--to_hf", f"{where}/lm-tiny", "--out", str(tmp_path / out)]) == 0
    theirs, ours = (tmp_path / out / "model.safetensors" for out in ("theirs", "ours"))
    assert theirs.read_bytes() == ours.read_bytes()


def test_a_place_that_cannot_be_reached_is_an_error(capsys, tmp_path):
    assert "expected a directory or gs://BUCKET/..." in fails(
        capsys, *command("lm-tiny", tmp_path)[:2], "--workdir", "s3://bucket/run"
    )
