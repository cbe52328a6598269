"""Which language a text is in, told from its script and its function words: enough to count a file's languages.

No model and no download; a text of a few words without any function word stays undecided.
"""

import re

FUNCTION_WORDS = {
    "English": "the a an and of to is are was were be in on at by for from with as that this it i you he she we they "
    "my your his her our not no so if or but do does can will has have had what how which who there than then about",
    "German": "der die das und ist nicht ein eine zu mit von den dem ich sie wie für auf auch es wir was sind wird",
    "French": "le la les et est une des que pour dans pas qui avec vous sur du je nous comment ce il sont au être",
    "Spanish": "el los las y es una que de para con por no se en su como qué lo más del yo un está son",
    "Portuguese": "o os as e é uma que não para com por em um do da no na como se mais eu você são está dos",
    "Italian": "il lo gli e è una che di per con non un del della sono come si più nel ho alla questo ci dei",
    "Dutch": "de het een en is van niet dat voor met op zijn ik je te wat hoe aan er bij ook deze naar worden",
    "Swedish": "och det är att en som på av för med inte den jag till hur vad ett har om du de kan ska från",
    "Danish or Norwegian": "og det er at en som på av af for med ikke den jeg til hvordan hva hvad et har om kan fra",
    "Polish": "na nie się jest to do że jak co po dla są od ale czy tym przez tak jego oraz jako",
    "Czech": "je na se to že do jak ve ze pro ale nebo co jsem jsou by tak který když jako má při",
    "Finnish": "ja on ei se että oli hän mutta kun myös ovat joka tai niin kuin mitä sen voi minä ole mikä olla",
    "Turkish": "ve bir bu için ile ne da de çok olarak mi daha gibi ben nasıl var olan en kadar değil ama sonra",
    "Indonesian": "yang dan di untuk dengan dari ini itu tidak adalah ke pada apa dalam saya akan atau bisa juga oleh",
    "Vietnamese": "và của là có không được cho các một những trong với người này tôi đã bạn để như thế khi làm",
}
SCRIPTS = {
    "Japanese": "\u3040-\u30ff",  # before Chinese, whose characters it uses as well
    "Korean": "\uac00-\ud7af",
    "Chinese": "\u4e00-\u9fff",
    "Cyrillic": "\u0400-\u04ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Greek": "\u0370-\u03ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
READ = 500  # characters of a text that are read
ENOUGH, SHARE = 2, 0.1  # different function words that decide, and of all different words: less has a list of names
_LANGUAGES: dict[str, list[str]] = {}
for _name, _words in FUNCTION_WORDS.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_name)
_OF_SCRIPT = [(name, re.compile(f"[{characters}]")) for name, characters in SCRIPTS.items()]
_WORD = re.compile(r"[^\W\d_]+")


def language(text: str) -> str | None:
    """A key of `FUNCTION_WORDS` or, for a text of which a fifth is in another script, of `SCRIPTS`; else None."""
    text = text[:READ]
    if not text.isascii():
        for name, characters in _OF_SCRIPT:
            if 5 * len(characters.findall(text)) > len(text):
                return name
    words = set(_WORD.findall(text.lower()))
    hits: dict[str, int] = {}
    for word in words & _LANGUAGES.keys():
        for name in _LANGUAGES[word]:
            hits[name] = hits.get(name, 0) + 1
    most = max(hits.values(), default=0)
    first = [name for name, count in hits.items() if count == most]
    return first[0] if most >= max(ENOUGH, SHARE * len(words)) and len(first) == 1 else None
