import pytest

from onelabel.configs.load import load
from onelabel.configs.passwords import has_password, without_password
from onelabel.errors import ConfigError

DATA = ("data.labelled=a.nii.gz", "data.unlabelled=b/")


def test_credentials_are_cut_out() -> None:
    text = "see http://user:pass@host/x, s3://KEY:ab/cd@bucket/y, postgresql://db?password=word&x=1 and sqlite:////tmp/a.db"
    cut = "see http://host/x, s3://bucket/y, postgresql://db?password=...&x=1 and sqlite:////tmp/a.db"
    assert without_password(text) == cut


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://KEY:SECRET@bucket/x", True),
        ("postgresql://me:word@host:5432/db", True),
        ("s3://KEY:ab/cd@bucket/x", True),
        ("postgresql+psycopg2://db/mlflow?user=me&password=word", True),
        ("abfs://c@account/x?tenant_id=1&client_secret=S", True),
        ("http://host/x?design=7#token", False),
        ("s3://bucket/a:b@c", False),
        ("http://host:8265/x@y", False),
        ("postgresql://me@host:5432/db", False),
        ("/data/a:b@c", False),
    ],
)
def test_passwords_are_known(text: str, expected: bool) -> None:
    assert has_password(text) is expected


@pytest.mark.parametrize(
    "setting",
    [
        "tracking.uri=http://me:secret@host:5000",
        "storage=s3://KEY:secret@bucket/runs",
        "data.test=s3://KEY:secret@bucket/heads",
        "data.test={path: 's3://KEY:secret@bucket/heads'}",
    ],
)
def test_a_setting_with_a_password_is_refused_and_not_repeated(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"config key '[\w.]+' = '\w+://[a-z]+.*holds a password") as caught:
        load(["singlestrip", *DATA, setting])
    assert "secret" not in str(caught.value)
