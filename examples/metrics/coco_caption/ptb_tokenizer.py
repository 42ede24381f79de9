r"""Splits captions into the Penn Treebank words of pycocoevalcap's `PTBTokenizer`, without Java.

pycocoevalcap runs `edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase` of Stanford CoreNLP 3.4.1 over all
captions as one file and drops punctuation. CIDEr, BLEU, ROUGE-L and METEOR count its words. So scores can be compared
only if the words are the same. Two of its results may surprise:

- Brackets stay, as `-lrb-` and `-rrb-`, and so do `?!` and `!!`. pycocoevalcap's list of punctuation has neither the
  lower-case brackets nor doubled marks.
- The captions of one call are one text. A full stop after a single letter belongs to the letter (`vitamin b.`, one
  word) or ends the sentence (`vitamin b`), and the first word of the next caption decides which.

How it works: every rule of `RULES` is tried at each position. The rule that reads furthest wins, including its
look-ahead; of two such rules, the earlier one wins. Letters that no rule takes are dropped. The rules restate, in
Python's regular expressions, the observed behaviour of `PTBLexer.flex` (edu/stanford/nlp/process, CoreNLP 3.4.1). Each
rule names its macro there.

Known differences, none of which was met in captions:

- A line break within a caption (`\r`, `\v`, `\f`, U+2028, U+2029) is a space here. There it starts a new line, and all
  later captions go to the wrong images.
- Java reads the captions in the encoding of the locale. The words here are those that it gives for UTF-8.
- Letters that are new in Unicode 6 or later are words here and dropped there, and so are some combining marks of Indic
  scripts.
- A tag with a quoted attribute that is closed only in a later caption; the small Σ at the end of a word.
- An Asian smiley that begins with `x.[^x=`: by a mistake in the flex file it extends to a later `<>]`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# pycocoevalcap/tokenizer/ptbtokenizer.py compares with lower-cased words, so its -LRB- ... -RCB- never match.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])


def _characters(*categories: str, below: int = 0x10000) -> str:
    """The characters of some Unicode categories, as ranges of a character class."""
    ranges: list[list[int]] = []
    for code in range(below):
        if unicodedata.category(chr(code)) in categories:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


def _any(words: str) -> str:
    """A pattern for any of some words, in any case."""
    return f"(?i:{'|'.join(words.split())})"


# --- Characters ---

ALPHA = _characters("Lu", "Ll", "Lt", "Lm", "Lo")
DIGIT = _characters("Nd")
# The soft hyphen, spacing accents (a ring in place of degrees), signs of Greek and Armenian; combining accents.
MARK = "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff\u0375\u0384\u0385\u03f6\u055a-\u055f"
MARK += _characters("Mn", "Mc", below=0x0F00)
LETTER = f"(?:[{ALPHA}{MARK}]|(?i:&[aeiou](?:acute|grave|uml);))"
LETTER_OR_DIGIT = f"(?:[{DIGIT}]|{LETTER})"
BLANK = "[ \t\u00a0\u2000-\u200a\u3000]"
SPACE = f"(?:{BLANK}|[\n\u0085])"
APOSTROPHE = "(?:['\u0092\u2019]|(?i:&apos;))"
ANY_APOSTROPHE = "(?:['`\u0091\u0092\u2018\u2019\u201b]|(?i:&apos;))"
HYPHEN = "[-_\u058a\u2010\u2011]"
AMPERSAND = "(?:(?i:&amp;)|&)"
PAUSE = "[,;:\u3001]"
# Signs, degrees, arrows, mathematics, boxes, full-width ASCII. Letters among them are words, as WORD comes first.
SYMBOL = (
    r"+%&~^|\\\u00a6-\u00a9\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00d7\u00f7\u0387\u05be\u2016\u2017\u2020-\u2023\u2030-\u2038"
    r"\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20"
    r"\uff3b-\uff40\uff5b-\uff65"
    # Punctuation of Greek, Armenian, Hebrew, Arabic, Syriac, N'Ko, Devanagari and Thai.
    r"\u037e\u0589\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4"
    r"\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd"
)

# --- Words ---

# With a missing space, "door.The" is one word.
WORD = f"{LETTER}{LETTER_OR_DIGIT}*(?:[.!?]{LETTER}{LETTER_OR_DIGIT}*)*"
NOT = f"[nN]{ANY_APOSTROPHE}[tT]"
CONTRACTION = f"{APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
# Hyphens join words, "20-year-old", also with French articles, "d'Art-l'Or".
PREFIX = f"(?:[dDoOlL]{ANY_APOSTROPHE}[{ALPHA}{DIGIT}])?"
COMPOUND = f"{PREFIX}[{ALPHA}{DIGIT}]+(?:{HYPHEN}{PREFIX}[{ALPHA}{DIGIT}]+)*"
ACRONYM = r"(?:(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))|[A-Za-z](?:\.[A-Za-z])+)"
# The first part may hold a decimal point, and the others may be initials: "9.5-inch", "anti-U.S.".
HYPHENATED = f"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{ACRONYM}\\.|[A-Za-z0-9\u00ad]+))+"
FIRM = f"[A-Z]+(?:(?:{AMPERSAND}|\\+)[A-Z]+)+"
EITHER_OR = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
APOSTROPHE_WORD = "|".join(
    [
        f"[A-HJ-XZn]{ANY_APOSTROPHE}[{ALPHA}]{{2,}}",  # O'Brien; not I'm, y'all
        f"[{ALPHA}]+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z][{ALPHA}]*",  # Shi'ite
        f"{APOSTROPHE}[nN]{APOSTROPHE}?|{APOSTROPHE}[2-9]0(?i:s)",  # rock 'n' roll, the '90s
        f"{APOSTROPHE}{_any('em till? cause')}|{_any('Dunkin somethin ol')}{APOSTROPHE}",
        _any(r"cont'd\.? nor'easter c'mon e'er s'mores ev'ry li'l nat'l"),
        f"[oO]{ANY_APOSTROPHE}[oO]|[lLdDjJ]{APOSTROPHE}",
    ]
)

# --- Abbreviations, which keep their full stop ---

# Some are words unless they begin with a capital letter: "Mass." but "mass".
ABBREVIATION = "|".join(
    [
        _any("Jan Feb Mar Apr Jun Jul Aug Sept? Oct Nov Dec Mon Tues? Wed Thu Thurs Fri"),
        _any("Ala Ariz Calif Colo Conn Ct Dak Fla Ga Ind Kans? Ky Md Mich Minn Mo Mont Neb Nev Okla Penn Tenn Va Vt"),
        _any("Wisc? Wyo Inc Cos? Corp Ltd Plc Rt Bancorp Dept Bhd Assn Univ Intl Sys tel est ext sq Jr Sr Bros"),
        _any(r"(?:Ed|Ph)\.D Blvd Rd Esq etc al seq bldg") + "|(?i:pp?t)[ye](?i:s?)",
        "(?:A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash))",
    ]
)
TITLE = "|".join(
    [
        f"{ACRONYM}|[A-Za-z]",
        _any("Mr Mrs Ms Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt Cpl Pvt Mt Capt"),
        _any("Ste? Ave Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Ft Adj Adv Asst Assoc Insp Ens Mlle Mme"),
        _any(r"Msgr Sfc vs Alex Wm Jos Cie a\.k\.a cf TREAS Ph Invt Elec Natl") + "|M(?i:iss)|[mM][ft][gG]",
    ]
)
# After these, "b." ends a sentence. Only the first letter's case counts.
SENTENCE_STARTS = (
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More "
    "Mr\\. Ms\\. Now Once One Other Our She Since So Some Such That The Their Then There These They This "
    "We When While What Yet You"
)
SENTENCE_START = "|".join(f"{word[0]}(?i:{word[1:]})" for word in SENTENCE_STARTS.split())

# --- Numbers and addresses ---

NUMBER = f"[-+]?(?:[{DIGIT}]+(?:[.:,\u00ad\u066b\u066c][{DIGIT}]+)*|(?:[.:,\u00ad\u066b\u066c][{DIGIT}]+)+)"
FRACTION = f"(?:[{DIGIT}]{{1,4}}[- \u00a0])?[{DIGIT}]{{1,4}}(?:\\\\?/|\u2044)[{DIGIT}]{{1,4}}"
PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
    r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)
PATH = r"""/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]"""
URL = r"""(?i:https?)://[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},-]"""
# ",-_" is a range with the capital letters and digits, so "foo.com" is a site, and "Foo.com" is a word.
SITE = (
    r"""(?:(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""
    r"""|(?:[^ \t\n\f\r"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"""
)
SITE_AND_PATH = SITE.replace(")+", ")+?") + PATH  # the path begins at the first slash
EMAIL = (
    r"""(?:<|(?i:&lt;))?[a-zA-Z0-9][^ \t\n\f\r"<>|(){}\u00a0]*@(?:[^ \t\n\f\r"<>|(){}.\u00a0]+\.)*"""
    r"""[^ \t\n\f\r"<>|(){}.\u00a0]+(?:>|(?i:&gt;))?"""
)
FILE_TYPE = _any(
    "bat bmp class cgi cpp dll docx? exe gif gz html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt wav "
    "xml zip c h x"
)
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
TAG = rf"<(?:[!?][A-Za-z-][^>\n]*|/{_NAME}|{_NAME}(?: +(?:{_NAME} *= *(?:'[^'\n]*'|\"[^\"\n]*\")|{_NAME}))* */?) *>"

ASIAN_SMILEY = r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"

# --- From a token to a word ---


def _without_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _in_one_piece(text: str) -> str:
    """Makes spaces non-breaking. Of pycocoevalcap's scorers, only ROUGE-L's does not split at them."""
    return text.replace(" ", "\u00a0").replace("(", "-LRB-").replace(")", "-RRB-")


def _plain_ampersand(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


def _latex_quotes(text: str) -> str:
    for quotes, latex in (("\u0091\u2018\u201b\u2039", "`"), ("\u0092\u2019\u203a", "'")):
        text = re.sub(f"[{quotes}]", latex, text)
    for quotes, latex in (("\u0093\u201c\u00ab", "``"), ('\u0094\u201d\u00bb"', "''")):
        text = re.sub(f"[{quotes}]", latex, text)
    return re.sub("&apos;", "'", re.sub("&quot;", "''", text))


FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
CURRENCY = "\u00a2-\u00a5\u0080\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6"
CURRENCIES = {"¢": "cents", "£": "#", "\u0080": "$", "¤": "$", "₠": "$", "€": "$"}
BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}


# --- The rules ---


@dataclass(frozen=True)
class Rule:
    """A type of token."""

    name: str  # the macro of PTBLexer.flex
    token: str  # regular expression
    followed_by: str = ""  # regular expression of the look-ahead, which is left for the next token
    normalize: Callable[[str], str] = str  # gives the word for the token's text


def _splits(first: str, second: str) -> Rule:
    return Rule(f"ASSIMILATIONS {first}{second}", f"(?i:{first})", f"(?i:{second})")


RULES = (
    # C++ and C#, before they are a letter and signs.
    Rule("PROG_LANGS", r"(?i:c\+\+|[cf]\#)"),
    # Two words in Treebank, spelled as one.
    *(_splits("can", "not"), _splits("'t", "was"), _splits("'t", "is"), _splits("gon", "na"), _splits("wan", "na")),
    *(_splits("got", "ta"), _splits("lem", "me"), _splits("gim", "me")),
    # Markup in scraped captions: a tag is a word; dashes are "--" in Treebank; &#39; stays.
    Rule("SGML", TAG, normalize=lambda text: text.replace(" ", "\u00a0")),
    Rule("SPMDASH", "&(?i:MD|mdash|ndash);|[\u0096\u0097\u2013\u2014\u2015]", normalize=lambda text: "--"),
    Rule("SPAMP", "(?i:&amp;)", normalize=_plain_ampersand),
    Rule("SPPUNC", "&(?:\\#[0-9]+|(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq));"),
    # Words. In "man's" the rule reads all and takes "man"; in "don't" it takes "do". The rest comes next.
    Rule("WORD, REDAUX", WORD, f"(?:{CONTRACTION})?", _without_soft_hyphens),
    Rule("SWORD", "[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", NOT, _without_soft_hyphens),
    Rule("APOWORD", APOSTROPHE_WORD),
    # The y' of "y'all".
    Rule("APOWORD2", f"[yY]{APOSTROPHE}", f"[{ALPHA}]"),
    # Addresses, @name and #tag.
    Rule("FULLURL", URL),
    Rule("LIKELYURL", SITE),
    Rule("LIKELYURL with a path", SITE_AND_PATH),
    Rule("EMAIL", EMAIL),
    Rule("TWITTER", f"@[A-Za-z_][A-Za-z_0-9]*|\\#{LETTER}+"),
    # The rest of contractions: "'s", "n't".
    Rule("REDAUX", CONTRACTION, "[^A-Za-z]", _latex_quotes),
    Rule("SREDAUX", NOT, normalize=_latex_quotes),
    # Numbers: "9-2/2014"; "1,000", "5:30", "-1"; "m²"; "1 1/2"; "½", spelled out.
    Rule("DATE", f"[{DIGIT}]{{1,2}}[-/][{DIGIT}]{{1,2}}[-/][{DIGIT}]{{2,4}}"),
    Rule("NUMBER", NUMBER, normalize=_without_soft_hyphens),
    Rule("SUBSUPNUM", "[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    Rule("FRAC", FRACTION, normalize=_in_one_piece),
    Rule("FRAC2", "[\u00bc-\u00be\u2153-\u215e]", normalize=lambda text: FRACTIONS.get(text, text)),
    # Words that Treebank keeps unchanged, or with their hyphen.
    Rule("TBSPEC", f"(?i:-[lr][rcs]b-|C\\.D\\.s|pro-|anti-|S{AMPERSAND}(?:P-500|Ls))", normalize=_plain_ampersand),
    Rule("TBSPEC with an apostrophe", f"(?i:Cap{APOSTROPHE}n|c{APOSTROPHE}est)"),
    # "black/white", "his/her/its", "t-shirt/dress".
    Rule("THING3", EITHER_OR),
    # Currencies as Treebank has them: "US$", and "#" for pounds.
    Rule("DOLSIGN", "[A-Z]*\\$|\\#"),
    Rule("DOLSIGN2", f"[{CURRENCY}]", normalize=lambda text: CURRENCIES.get(text, text)),
    # Abbreviations: the "b" of "plan b. The"; "fig. 5"; "corp.", which may also end a sentence; "Mr.", "U.S.".
    Rule("ACRONYM", "[A-Za-z]", f"\\.{SPACE}+(?:{SENTENCE_START}|{TAG}){SPACE}"),
    Rule("ABBREV3", f"{_any('ca figs? prop nos? bldg pp op')}\\.", f"{SPACE}?[{DIGIT}]"),
    Rule("ABBREV1", f"(?:{ABBREVIATION})\\.", r"(?:[\s\S]{2})?"),
    Rule("ABBREV2", f"(?:{TITLE})\\."),
    Rule("ACRO", ACRONYM, SPACE),
    # A year, "'90", and a file whose name begins with a digit, "1.jpg".
    Rule("TBSPEC2", f"{APOSTROPHE}[0-9][0-9]", SPACE),
    Rule("FILENAME", f"{LETTER_OR_DIGIT}+(?:\\.{LETTER_OR_DIGIT}+)*\\.{FILE_TYPE}", f"(?:{SPACE}|[.?!,])"),
    # An unknown abbreviation, known by the comma after its full stop.
    Rule("WORD before a pause", f"{WORD}\\.", PAUSE, _without_soft_hyphens),
    Rule("PHONE", PHONE, normalize=_in_one_piece),
    Rule("DBLQUOT", '"|(?i:&quot;)', normalize=_latex_quotes),
    Rule("LESSTHAN", "<|(?i:&lt;)", normalize=lambda text: "<"),
    Rule("GREATERTHAN", ">|(?i:&gt;)", normalize=lambda text: ">"),
    Rule("SMILEY", r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]", _in_one_piece),
    Rule("ASIANSMILEY", ASIAN_SMILEY, normalize=_in_one_piece),
    # Signs.
    Rule("Brackets", r"[\[\](){}]", normalize=lambda text: BRACKETS.get(text, text)),
    Rule("HYPHENS", "-+", normalize=lambda text: "--" if len(text) in (3, 4) else text),
    Rule("LDOTS", "\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", normalize=lambda text: "..."),
    Rule("FNMARKS, ASTS, =", r"@+|\#+|_+|\*+|(?:\\\*){1,3}|="),
    Rule("INSENTP", PAUSE),
    Rule("Sentence ends", "[?!]+|[.\u00a1\u00bf\u3002]"),
    Rule("Slash", "/"),
    # Words with hyphens, "_", digits, "&" or "+", and those before a pause.
    Rule("HTHING", HYPHENATED, normalize=_without_soft_hyphens),
    Rule("HTHING before a pause", f"{HYPHENATED}\\.", PAUSE, _without_soft_hyphens),
    Rule("THING", COMPOUND),
    Rule("THING before a pause", f"{COMPOUND}\\.", PAUSE),
    Rule("THINGA", FIRM, normalize=_plain_ampersand),
    Rule("THINGA before a pause", f"{FIRM}\\.", PAUSE, _plain_ampersand),
    # Quotes. The first reads further, so that "'so" is no "'s". All are dropped, so their direction does not matter.
    Rule("Opening quote", "'", "[A-Za-z][^ \t\n\u00a0]", normalize=_latex_quotes),
    Rule("REDAUX before a letter, at the end", CONTRACTION, normalize=_latex_quotes),
    Rule("QUOTES", f"''|[`\u0091-\u0094\u00ab\u00bb\u2018-\u201f\u2039\u203a]{{1,2}}|{APOSTROPHE}", "", _latex_quotes),
    Rule("FAKEDUCKFEET", "<<|>>"),
    Rule("MISCSYMBOL", f"[{SYMBOL}]"),
    Rule("SPACES, &nbsp;", f"{BLANK}+|(?i:&nbsp;)", normalize=lambda text: ""),
    # The next caption.
    Rule("NEWLINE", "\n"),
)
_COMPILED = [(re.compile(f"({rule.token})(?:{rule.followed_by})"), rule.normalize) for rule in RULES]
# For speed, blanks and most words are matched first: no other rule reads across the end of letters, or splits them.
_PLAIN = re.compile(rf"(?: {BLANK}*)?(?:(?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\b)([A-Za-z]+)(?=[ \n]|\Z))?")
_LINE_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\u2028\u2029"), " ")


def _words(text: str) -> Iterator[str]:
    """The words of a text, in lower case, with `"\\n"` between its lines."""
    position = 0
    while position < len(text):
        plain = _PLAIN.match(text, position)
        position = plain.end()
        if plain[1]:
            yield plain[1].lower()
            continue
        best, normalize = None, str
        for pattern, change in _COMPILED:
            match = pattern.match(text, position)
            if match and (best is None or match.end() > best.end()):
                best, normalize = match, change
        if best and (word := normalize(best.group(1))):
            yield word.lower()
        position = best.end(1) if best else position + 1


def tokenize_captions(captions: Iterable[str]) -> list[str]:
    """Returns the words of each caption, in lower case, without punctuation, joined by one space.

    The order of captions matters for a last word like `b.`; see the module's docstring. A caption that is not a string
    raises a TypeError.
    """
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"Caption {index} must be a string, but is {caption!r}.")
    text = "\n".join(caption.translate(_LINE_BREAKS) for caption in captions)
    lines: list[list[str]] = [[]]
    for word in _words(text):
        if word == "\n":
            lines.append([])
        else:
            lines[-1].append(word)
    # pycocoevalcap also strips other spaces at the end of an address.
    split = [" ".join(line).rstrip().split(" ") for line in lines]
    return [" ".join(word for word in words if word not in PUNCTUATION) for words in split] if captions else []


def tokenize_caption(caption: str) -> str:
    """Splits a single caption into words; see [`tokenize_captions`]."""
    return tokenize_captions([caption])[0]
