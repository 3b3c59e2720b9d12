"""Words and sentences of the extraction task (`extraction.py`): pools of values, and schemas with their templates.

A pool is `(seen, held_out)`: every fifth value is kept out of training. In a template `{key}` is a value, `{_key}`
another value of the same pool that would be wrong, and `[a|b]` one of several wordings.
Change anything here and the golden hash of `tests/test_extraction.py` changes with it.
"""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

Value = str | int


class Pool(NamedTuple):
    seen: tuple[Value, ...]
    held_out: tuple[Value, ...]


class Schema(NamedTuple):
    fields: dict[str, str]
    """JSON key -> name of its pool, in the order of the JSON object."""
    templates: tuple[str, ...]


def _pool(values: Iterable[Value]) -> Pool:
    unique = tuple(dict.fromkeys(values))
    return Pool(tuple(value for i, value in enumerate(unique) if i % 5 != 4), unique[4::5])


def _pairs(first: Pool, second: Pool) -> Pool:
    return Pool(*(tuple(f"{a} {b}" for a, b in product(x, y)) for x, y in zip(first, second)))


def _words(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",")]


_FIRST = _pool(
    _words("""Maria, James, Aisha, Tom, Elena, David, Priya, Lucas, Nina, Omar, Grace, Peter, Sofia, Daniel, Mei, Jack,
    Fatima, Henry, Clara, Diego, Hannah, Ivan, Julia, Kevin, Laura, Marco, Nadia, Oliver, Paula, Rosa, Samuel, Tara,
    Victor, Wendy, Yusuf, Zoe, Adam, Bella, Carlos, Diana, Erik, Fiona, George, Helen, Igor, Jane, Karim, Lena, Martin,
    Nora, Oscar, Petra, Rahul, Sara, Theo, Uma, Vera, Walter, Ximena, Yara, Aaron, Bianca, Cedric, Dora, Edward, Freya,
    Gustav, Heidi, Isaac, Jasmine, Kenji, Lydia, Miguel, Naomi, Owen, Pilar, Quentin, Rita, Stefan, Tessa, Umberto,
    Valerie, Wei, Yvonne, Zach, Amir, Beth, Colin, Daphne, Emil, Farah, Gavin, Holly, Ines, Joel, Kira, Leon, Mona,
    Nils, Olga, Pablo, Ruth, Simon, Tanya, Vikram, Willow, Alice, Bruno, Chloe, Derek, Esther, Felix, Gloria, Hugo,
    Irene, Jonas, Katya, Louis, Megan, Noah, Paul, Rachel, Sven, Tariq, Vivian, Anton, Bridget, Chen, Dmitri, Eva,
    Frank, Greta, Hassan, Iris, Jorge, Karen, Liam, Mina, Nathan, Ravi, Sandra, Thomas, Ursula, Albert, Carmen, Dylan,
    Emma, Florian, Hana, Jamal, Kate, Leila, Max, Nick, Pierre, Robin, Sean, Tina, Andre, Becky, Claire, Ethan""")
)
_LAST = _pool(
    _words("""Lopez, Smith, Khan, Brown, Rossi, Lee, Patel, Silva, Novak, Haddad, Walker, Jansen, Garcia, Cohen, Wang,
    Baker, Rahman, Ford, Weber, Torres, Green, Petrov, Marsh, Young, Stein, Bianchi, Hill, Reed, Santos, Diaz, Moore,
    Singh, Meyer, Grant, Aziz, Becker, Stone, Russo, Vega, King, Larsen, Price, Wood, Fischer, Sokolov, Gray, Nasser,
    Koch, Evans, Berg, Costa, Horvat, Mehta, Adams, Klein, Rao, Lind, Hughes, Ramos, Farouk, Hall, Romano, Blake,
    Turner, Olsen, Huber, Wolf, Bell, Carter, Tanaka, Morris, Ortiz, Fox, Byrne, Navarro, Dubois, Conti, Popov, Cruz,
    Rivera, Ferrari, Sato, Moreau, Cole, Rezaei, Hart, Murphy, Nguyen, Dean, Mills, Kaur, Page, Nair, Roth, Simon,
    Foster, Gomez, Lang, Brandt, Webb, Castro, Kim, Ward, Hansen, Reyes, Shah, Doyle, Perry, Ross, Jones, Cook""")
)
_CITY = _pool(
    _words("""Lisbon, Denver, Osaka, Paris, Nairobi, Turin, Boston, Lyon, Seoul, Porto, Dallas, Oslo, Lima, Dublin,
    Austin, Vienna, Cairo, Leeds, Miami, Prague, Geneva, Phoenix, Milan, Tokyo, Bristol, Krakow, Delhi, Hamburg,
    Chicago, Athens, Toronto, Naples, Mumbai, Malaga, Portland, Zurich, Accra, Ghent, Sydney, Tampa, Madrid, Cork,
    Berlin, Quito, Seattle, Bergen, Houston, Lagos, Kyoto, Atlanta, Basel, Havana, York, Munich, Bogota, Oxford, Riga,
    Detroit, Hanoi, Valencia, Perth, Tunis, Orlando, Bonn, Rome, Baltimore, Salzburg, Manila, Leipzig, Memphis, Bern,
    Jakarta, Cardiff, Florence, Omaha, Warsaw, Beirut, Boulder, Genoa, Helsinki, Calgary, Dakar, Seville, Ottawa,
    Brussels, Tucson, Lahore, Verona, Bath, Santiago, Tulsa, Utrecht, Nagoya, Reno, Budapest, Glasgow, Montreal,
    Cologne, Kampala, Venice, Tallinn, Raleigh, Bilbao, Chennai, Buffalo, Antwerp, Caracas, Lille, Savannah, Bangkok,
    Stuttgart, Vancouver, Brisbane, Rabat, Belfast, Anchorage, Granada, Istanbul, Aberdeen, Nashville, Rotterdam,
    Dresden, Amman, Oakland, Bologna, Auckland, Exeter, Marseille, San Diego, New York, Cape Town, Las Vegas, Hong Kong,
    Tel Aviv, San Jose, New Delhi, Santa Fe, Mexico City, Kansas City, Buenos Aires, Los Angeles, Salt Lake City""")
)
_THING = _words("""desk lamp, notebook, phone case, coffee mug, garden chair, backpack, keyboard, water bottle, yoga
    mat, bread knife, wall clock, rain jacket, camping tent, bike helmet, mirror, pillow, tripod, bookshelf, board game,
    blanket, travel mug, drill, hammer, soup bowl, wool hat, leather belt, laptop stand, monitor, printer, office chair,
    paint roller, frying pan, kettle, toaster, blender, candle, picture frame, flower pot, ladder, guitar, tennis ball,
    football, jump rope, sleeping bag, headlamp, compass, fishing rod, bath towel, shower curtain, door mat, coat rack,
    shoe rack, lunch bag, laundry basket, trash can, paper towel, light bulb, power strip, phone charger, mouse pad,
    webcam, speaker, microphone, memory card, hard drive, router, camera bag, sun hat, baseball cap, sweater, hoodie,
    cotton shirt, raincoat, wallet, handbag, suitcase, passport cover, neck pillow, sketchbook, paint set, marker,
    stapler, desk fan, heater, air filter, vacuum cleaner, mop, broom, bucket, sponge, soap bar, face cream, hair dryer,
    razor, bird feeder, dog collar, cat bed, fish tank, garden hose, rake, shovel, seed tray, lawn mower, wheelbarrow,
    tool box, wrench, screwdriver, tape measure, wool rug, coffee table, bar stool, bed frame, nightstand, armchair,
    folding table, tea pot, wine rack, cutting board, mixing bowl, cake tin, rolling pin, apron, oven glove,
    dinner plate, napkin, chess set, puzzle, kite, doll, toy train, violin case, drum pad, music stand, easel,
    bicycle pump, car charger, tire gauge, roof rack, snow shovel""")
_COMPANY = _pool(
    _words("""Brightwave, Nordlink, Apex Foods, Bluestone, Cedar Labs, Datapeak, Evergreen, Fairway, Greenfield,
    Halcyon, Ironwood, Juniper, Kestrel, Lumen, Meridian, Northstar, Oakridge, Pinnacle, Quantum, Redwood, Silverline,
    Terra Nova, Unity Bank, Vantage, Westbrook, Zenith, Acorn, Beacon, Clearview, Driftwood, Eastgate, Firefly,
    Goldleaf, Harbor Bank, Keystone, Lakeside, Maple Bank, Nimbus, Orchard, Parkway, Riverside, Summit, Tidewater,
    Valor, Atlas, Cobalt, Delta Foods, Echo Labs, Falcon, Granite, Horizon, Jade Media, Lantern, Magnolia, Nova Labs,
    Onyx, Quarry, Saffron, Titan, Vertex, Amber Bank, Birch, Coral Media, Dune, Ember, Fjord, Garnet, Hazel, Indigo,
    Lotus, Pearl Foods, Raven, Sierra, Topaz, Vista, Arrow""")
)
_ROLE = _pool(
    _words("""nurse, software engineer, accountant, head chef, driver, graphic designer, teacher, data analyst, lawyer,
    sales manager, editor, electrician, pharmacist, web developer, architect, librarian, plumber, office manager,
    mechanic, project manager, translator, dentist, biologist, photographer, carpenter, security guard, bank teller,
    receptionist, pilot, product manager, researcher, baker, gardener, tour guide, film editor, copywriter, chemist,
    surgeon, paralegal, physicist, recruiter, cashier, florist, warehouse clerk, social worker, store manager,
    financial analyst, lab technician, barista, civil engineer, art director, consultant, economist, sound engineer,
    waiter, journalist, auditor, veterinarian, quality inspector""")
)
_STREET = _words("""Oak, Maple, Park, Mill, River, Station, Church, Garden, King, Market, Cedar, High, Lake, Elm,
    Bridge, School, Hill, Forest, Queen, Pine, Castle, Harbor, Victoria, Spring, Chapel, Grove, Union, North, Green,
    Walnut, Bay, Cherry, Temple, Water, Liberty, Ash, Canal, Rose, Birch""")
_MASCOT = _words("""Rovers, Falcons, Tigers, Wolves, Hawks, Sharks, Bears, Lions, Eagles, Rockets, Pirates, Giants,
    Bulls, Comets, Panthers, Ravens, Knights, Dragons, Rangers, Royals, Vikings, Saints, Cobras, Badgers, Wasps,
    Mariners, Foxes, Jets, Titans, Hornets, Owls, Dolphins, Raiders""")
_MONTH = _words("January, February, March, April, May, June, July, August, September, October, November, December")
_WEEKDAY = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_DATE = [f"{m} {d}" for d in range(1, 29) for m in _MONTH] + [f"{d} {m}" for d in range(1, 29) for m in _MONTH]
_HOUR = [(h, "am") for h in range(7, 12)] + [(h, "pm") for h in range(1, 10)]

POOLS: dict[str, Pool] = {
    "first": _FIRST,
    "full": _pairs(_FIRST, _LAST),
    "doctor": Pool(*(tuple(f"Dr. {name}" for name in names) for names in _LAST)),
    "city": _CITY,
    "thing": _pool(_THING),
    "things": _pool(f"{thing}s" for thing in _THING),
    "company": _COMPANY,
    "role": _ROLE,
    "date": _pool(_DATE),
    "day": Pool(_pool(_DATE).seen + _pool(_WEEKDAY).seen * 60, _pool(_DATE).held_out + _pool(_WEEKDAY).held_out * 60),
    "time": _pool(
        [f"{h}:{m:02d}" for h in range(7, 22) for m in range(0, 60, 5)]
        + [f"{h}{m} {half}" for h, half in _HOUR for m in ("", ":15", ":30", ":45")]
    ),
    "price": _pool(
        [f"{sign}{n}" for n in range(3, 90) for sign in "$€£"]
        + [f"${n}.{cents}" for n in range(2, 40) for cents in ("50", "99", "25", "75")]
    ),
    "amount": _pool(f"{sign}{n}" for n in range(15, 990, 5) for sign in "$€£"),
    "rent": _pool(f"{sign}{n:,}" for n in range(450, 2900, 50) for sign in "$€£"),
    "count": _pool(range(12, 90)),
    "rooms": _pool(range(2, 9)),
    "degrees": _pool(range(2, 40)),
    "percent": _pool(f"{n}%" for n in range(5, 100, 5)),
    "minutes": _pool(range(10, 120, 5)),
    "room": _pool(f"{kind} {n}" for n in range(1, 41) for kind in ("Room", "Hall", "Lab", "Studio")),
    "gate": _pool(f"{letter}{n}" for n in range(1, 40) for letter in "ABCDE"),
    "flight": _pool(f"{c}{n}" for n in range(101, 990, 7) for c in ("BA", "LH", "AF", "UA", "DL", "TK", "KL", "AA")),
    "address": _pool(f"{n} {street} {kind}" for n in range(1, 99, 3) for street in _STREET for kind in ("St", "Road")),
    "color": _pool(
        _words("""red, navy blue, black, silver, olive, white, green, yellow, dark gray, pink, purple, brown, beige,
        orange, gold, sky blue, cream, teal, maroon, light gray, mint, coral, dark green, violet, bronze""")
    ),
    "sky": _pool(
        _words("""sunshine, light rain, clouds, snow, thunderstorms, fog, heavy rain, clear skies, drizzle, hail,
        showers, strong winds, sleet, haze, light snow, mist, freezing rain, scattered clouds, heavy snow, frost""")
    ),
    "team": _pairs(Pool(*(tuple(c for c in cities if " " not in str(c))[:60] for cities in _CITY)), _pool(_MASCOT)),
    "score": _pool(
        [f"{a}-{b}" for a in range(1, 8) for b in range(a)]
        + [f"{a}-{b}" for a in range(61, 99, 2) for b in range(52, a, 7)]
    ),
    "band": _pool(
        f"{a} {b}"
        for a in _words("Velvet, Paper, Silent, Golden, Electric, Broken, Midnight, Crystal, Neon, Wild, Lost, Iron")
        for b in _words("Foxes, Rivers, Hearts, Moons, Wolves, Gardens, Machines, Letters, Tigers, Waves, Ghosts")
    ),
    "venue": _pool(
        f"{a} {b}"
        for a in _words("Apollo, Grand, Royal, Union, Empire, Lyric, Regent, Star, Globe, Palace, Crown, Metro, Rex")
        for b in _words("Theater, Hall, Arena, Club, Stage, Gardens")
    ),
    "dish": _pool(
        f"{a} {b}"
        for a in _words("tomato, chicken, mushroom, lentil, pumpkin, beef, fish, potato, rice, spinach, carrot, onion")
        for b in _words("soup, stew, curry, pie, salad, pasta, bake, tart")
    ),
}

SCHEMAS: dict[str, Schema] = {
    "meeting": Schema(
        {"person": "first", "day": "day", "time": "time", "room": "room"},
        (
            "[Please book|I booked|We need] {room} for the meeting with {person} on {day} at {time}.",
            "{person} [will see|wants to see|is meeting] us on {day} at {time} in {room}.",
            "The [meeting|call|review] with {person} moved from {_day} to {day}, still at {time} in {room}.",
            "On {day} we [meet|talk to|interview] {person} in {room}; we start at {time}.",
            "[Reminder|Note to all|New slot]: {room}, {day}, {time}, [budget|contract|design] talk with {person}.",
            "We had planned {_time}, but {person} can only come at {time}. It is on {day} in {room}.",
            "[Hi team, the|The] review is at {time} on {day}. {person} will lead it in {room}.",
            "Since {_room} is taken, {person} will host us in {room} on {day} at {time}.",
            "At {time} on {day}, {person} [gives a talk|presents the plan|runs the workshop] in {room}.",
            "[Bring your laptop.|Coffee is ready.|Be on time.] {person} starts at {time} in {room} on {day}.",
        ),
    ),
    "order": Schema(
        {"customer": "full", "item": "things", "quantity": "count", "price": "price"},
        (
            "{customer} [ordered|bought|asked for] {quantity} {item} at {price} each.",
            "[Please send|Ship|We owe] {quantity} {item} to {customer}; the unit price is {price}.",
            "At {price} apiece, {customer} will take {quantity} {item}.",
            "Order of {quantity} {item} [came in|received] today. Customer: {customer}. Price: {price} each.",
            "{customer} first wanted {_quantity} {item} but settled on {quantity}, for {price} each.",
            "For the account of {customer}: {item}, {quantity} pieces, {price} each.",
            "We sold {quantity} {item} to {customer}, who paid {price} for each[.|, in cash.]",
            "The {item} cost {price} each, not {_price} as printed. {customer} took {quantity} of them.",
            "{quantity} {item} at {price} each are [reserved|packed|ready] for {customer}.",
            "[Good news:|As agreed,] {customer} buys {quantity} of our {item} at {price} each.",
        ),
    ),
    "flight": Schema(
        {"flight": "flight", "from": "city", "to": "city", "time": "time", "gate": "gate"},
        (
            "Flight {flight} from {from} to {to} [leaves|departs] at {time} from gate {gate}.",
            "[Attention please:|Last call:] {flight} to {to} is boarding at gate {gate} and leaves at {time}.",
            "Gate {gate}, {time}: {flight} from {from} to {to}[.|, on time.]",
            "{flight} [takes|brings] you from {from} to {to}. It departs at {time} from gate {gate}.",
            "I fly to {to} from {from} at {time}; the flight is {flight}.",
            "Due to [fog|a strike|repairs], {flight} to {to} departs at {time} instead of {_time}, gate {gate}.",
            "The {time} flight to {to}, {flight}, now leaves from gate {gate}, not gate {_gate}.",
            "Coming from {from}? Your connection {flight} to {to} leaves gate {gate} at {time}.",
            "Leaving {from} at {time}, {flight} will [land in|reach|carry us to] {to}.",
            "Passengers to {to} on {flight}: please go to gate {gate}. We leave {from} at {time}.",
        ),
    ),
    "job": Schema(
        {"name": "full", "role": "role", "company": "company", "city": "city"},
        (
            "{name} [works|has a job] as a {role} at {company} in {city}.",
            "{company} hired {name} as a {role} for its {city} office.",
            "[Meet|Say hello to] {name}, our new {role} in {city}. Welcome to {company}!",
            "After years as a {_role}, {name} is now a {role} at {company} in {city}.",
            "{name} left {_company} to join {company} as a {role} in {city}.",
            "In {city}, {company} made {name} its [new|first|second] {role}.",
            "A {role} by training, {name} moved to {city} to work for {company}.",
            "{name}, a {role} at {company}, lives in {city}[.| with two cats.]",
            "The {role} at {company} is {name}, who moved from {_city} to {city}.",
            "[According to the paper,|We hear that] {company} of {city} picked {name} as its {role}.",
        ),
    ),
    "product": Schema(
        {"item": "thing", "color": "color", "price": "price", "store": "company"},
        (
            "{store} sells a {color} {item} for {price}.",
            "The {color} {item} is {price} at {store}[.| this week.| until Sunday.]",
            "At {store} I found a {item} in {color} for [only |]{price}.",
            "[Correction:|Price change:] {item}, {color}, {price} instead of {_price}, at {store}.",
            "I paid {price} for this {color} {item} [from|at] {store}.",
            "{store} has the {item} in {color}, not in {_color}. It costs {price}.",
            "For {price} you get a {color} {item} at {store}[.|, shipping included.]",
            "A {item} at {_store} was too dear, so I got a {color} one at {store} for {price}.",
            "[My sister|A friend|My boss] wants the {color} {item} from {store}; the price is {price}.",
            "Price check: {store} asks {price} for the {item}. The color is {color}.",
        ),
    ),
    "weather": Schema(
        {"city": "city", "day": "day", "sky": "sky", "high": "degrees", "humidity": "percent"},
        (
            "[Expect|We expect] {sky} in {city} on {day}, with a high of {high} degrees.",
            "{city} will see {sky} on {day}; the high is {high} and humidity is {humidity}.",
            "{day} brings {sky} to {city}, with highs near {high} degrees and {humidity} humidity.",
            "In {city}, {day} means {sky}. The high will be {high} degrees, not {_high}.",
            "[Pack a coat:|Note:] {sky} in {city} on {day}, {high} degrees at most, humidity {humidity}.",
            "After {_sky} last week, {city} gets {sky} on {day}, with a high of {high}.",
            "On {day} the high in {city} is {high} degrees, with {sky} and {humidity} humidity.",
            "Humidity of {humidity} and {sky} are forecast for {city} on {day}, high {high}.",
            "The forecast for {city}: {day}, {sky}, a high of {high} degrees.",
            "Unlike {_city}, {city} will have {sky} on {day}, with a high of {high} degrees.",
        ),
    ),
    "match": Schema(
        {"winner": "team", "loser": "team", "score": "score", "day": "day"},
        (
            "The {winner} beat the {loser} {score} on {day}.",
            "On {day} the {loser} lost {score} to the {winner}[.|, to everyone's surprise.]",
            "[Final score|Result] from {day}: {score}. The {winner} win, the {loser} go home.",
            "The {winner} won {score} against the {loser} on {day}[.| after a slow start.]",
            "A {day} to forget for the {loser}: the {winner} won {score}.",
            "It ended {score} on {day}, and the {winner} [knocked out|defeated] the {loser}.",
            "The {loser} led early, but the {winner} took it {score} on {day}.",
            "[Fans cheered|Rain fell] on {day} as the {winner} defeated the {loser} {score}.",
            "After a draw in the first game, the {winner} beat the {loser} {score} on {day}.",
            "Beaten {score} by the {winner}, the {loser} left the cup on {day}.",
        ),
    ),
    "rental": Schema(
        {"city": "city", "rooms": "rooms", "rent": "rent", "address": "address"},
        (
            "{rooms}-room flat at {address} in {city}, rent {rent} a month.",
            "For rent in {city}: {rooms} rooms at {address}[.|, top floor.] {rent} per month.",
            "The flat at {address}, {city}, has {rooms} rooms and costs {rent} a month.",
            "We [pay|are asked for] {rent} a month for {rooms} rooms at {address} in {city}.",
            "{address}, {city}: rent was {_rent} and is now {rent} a month for {rooms} rooms.",
            "[Looking for a home?|New on the market.] {city}, {address}, {rooms} rooms, {rent} monthly.",
            "At {rent} a month, {address} in {city} gives you {rooms} rooms[.| and a balcony.]",
            "Moving from {_city} to {city}, I took {rooms} rooms at {address} for {rent} a month.",
            "Rent is {rent} for the {rooms} rooms at {address}, [close to|ten minutes from] the center of {city}.",
            "In {city} you get {rooms} rooms for {rent} a month, at {address}.",
        ),
    ),
    "appointment": Schema(
        {"patient": "full", "doctor": "doctor", "date": "date", "time": "time"},
        (
            "{patient} [will see|has a visit with|is booked with] {doctor} on {date} at {time}.",
            "{doctor} [expects|will examine] {patient} at {time} on {date}.",
            "On {date} at {time}, {patient} is due at the office of {doctor}.",
            "[Hello|Dear] {patient}, your visit with {doctor} is on {date} at {time}.",
            "{doctor} is away on {_date}, so {patient} will come on {date} at {time}.",
            "The visit of {patient} is now with {doctor}, not {_doctor}, on {date} at {time}.",
            "[Please confirm|Confirmed]: {date}, {time}, {doctor}, patient {patient}.",
            "At {time} on {date} {doctor} will [check|call] {patient}[.| about the results.]",
            "Patient {patient} moved the visit with {doctor} from {_time} to {time}, on {date}.",
            "{patient} called [today|again] and got {time} on {date} with {doctor}.",
        ),
    ),
    "delivery": Schema(
        {"item": "thing", "recipient": "full", "address": "address", "day": "day"},
        (
            "[Deliver|Bring|Take] the {item} to {recipient} at {address} on {day}.",
            "{recipient}, {address}, gets a {item} on {day}.",
            "On {day} the {item} goes to {recipient} at {address}.",
            "The {item} for {recipient} [arrives|should arrive] on {day} at {address}.",
            "{recipient} moved from {_address} to {address}. Please drop the {item} there on {day}.",
            "{_recipient} sent {recipient} a {item}; it reaches {address} on {day}.",
            "A {item} will be at {address} on {day}, [addressed to|to be signed by] {recipient}.",
            "Your {item} is on its way, {recipient}. We will be at {address} on {day}[.|, not on {_day}.]",
            "Parcel for {recipient}: one {item}, to {address}, by {day}.",
            "[The driver|Our courier] will hand {recipient} the {item} on {day} at {address}.",
        ),
    ),
    "concert": Schema(
        {"band": "band", "venue": "venue", "city": "city", "date": "date", "price": "price"},
        (
            "{band} play the {venue} in {city} on {date}; tickets cost {price}.",
            "On {date} {band} come to the {venue} in {city}[.| with a new album.]",
            "Tickets for {band} at the {venue} on {date} [are|cost] {price}.",
            "[See|Hear] {band} live in {city}: {venue}, {date}, {price} at the door.",
            "For {price} you can [see|hear] {band} at the {venue} in {city} on {date}.",
            "{band}, not {_band}, will headline the {venue} in {city} on {date}.",
            "The show of {band} moved from {_date} to {date}, still at the {venue} in {city}.",
            "In {city}, the {venue} presents {band} on {date}. Entry: {price}.",
            "I got a ticket for {price}! {band}, {venue}, {date}.",
            "Instead of {_city}, {band} will play {city} on {date}, at the {venue}.",
        ),
    ),
    "payment": Schema(
        {"sender": "first", "recipient": "full", "amount": "amount", "date": "date"},
        (
            "{sender} [sent|paid|transferred] {amount} to {recipient} on {date}.",
            "On {date} {recipient} [received|got] {amount} from {sender}.",
            "[Please pay|Send] {recipient} {amount} by {date}. Charge it to {sender}.",
            "{amount} went from {sender} to {recipient} on {date}[.| for the car.| for the rent.]",
            "{sender} meant to send {recipient} {_amount} but sent {amount} on {date}.",
            "The {amount} from {sender} reached {recipient} on {date}, not on {_date}.",
            "A transfer of {amount} to {recipient} was made by {sender} on {date}.",
            "{recipient} thanks {sender} for the {amount} [that came|received] on {date}.",
            "Date: {date}. {sender} gives {recipient} {amount}[.| as a loan.| as a gift.]",
            "[As promised,|In the end,] {sender} paid {recipient} back {amount} on {date}.",
        ),
    ),
    "recipe": Schema(
        {"dish": "dish", "cook": "first", "minutes": "minutes", "servings": "rooms"},
        (
            "{cook} makes {dish} in {minutes} minutes; it serves {servings}.",
            "The {dish} by {cook} takes {minutes} minutes and feeds {servings} [people|guests].",
            "[Tonight|Today] {cook} cooks {dish} for {servings}. It is ready in {minutes} minutes.",
            "In {minutes} minutes {cook} had {dish} for {servings} on the table.",
            "Serves {servings}: {dish}, a recipe by {cook}, {minutes} minutes.",
            "{cook} learned from {_cook} how to cook {dish} for {servings} in {minutes} minutes.",
            "It said {_minutes} minutes, but {cook} needed {minutes} for the {dish}. It serves {servings}.",
            "For {servings} people, {cook} prepares {dish}; [allow|it takes] {minutes} minutes.",
            "Not {_dish} again! {cook} made {dish} for {servings} in {minutes} minutes.",
            "Give the {dish} {minutes} minutes. {cook} says that it serves {servings}.",
        ),
    ),
}
