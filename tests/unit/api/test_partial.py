"""An expression that is matched piece by piece."""

from hypothesis import given
from hypothesis import strategies as st

from deploy.api.reading.partial import Expression, Step, ahead, num_held, text

BLANKS = Step(r"\s*", r"\s*")
KEY = Expression(BLANKS, text("<key>"), Step("([^<]*)", "[^<]*"), text("</key>"), ahead("!", "<end>"))


@given(key=st.text(alphabet="ab ", max_size=5), blanks=st.text(alphabet=" \n", max_size=3))
def test_every_beginning_of_a_match_may_come(key: str, blanks: str) -> None:
    whole = f"{blanks}<key>{key}</key>"
    for follows in ("!", "<end>"):
        assert (match := KEY.match(whole + follows))
        assert (match[0], match[1]) == (whole, key)
        assert all(KEY.may_come((whole + follows)[:end]) for end in range(len(whole + follows)))


def test_what_can_never_match_does_not_come() -> None:
    for lost in ("x", "<kex", "<key>a<b", "<key>a</key>x"):
        assert not KEY.may_come(lost)
        assert not KEY.match(lost)


@given(before=st.text(alphabet="<tag>", max_size=8))
def test_held_is_the_longest_end_that_may_begin_a_tag(before: str) -> None:
    ends = [n for n in range(min(len(before), 4) + 1) if "<tag>".startswith(before[len(before) - n :])]
    assert num_held(before, "<tag>") == max(ends)
