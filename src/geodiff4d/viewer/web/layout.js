// The controls, grouped as people think of a face: one slider moves both sides, and one that goes both ways stands for
// two opposite expressions. Whatever expression is not named here gets a slider of its own.

const pair = (label, stem) => ({ label, plus: [`${stem}Left`, `${stem}Right`] });
const one = (label, name) => ({ label, plus: [name] });
const GROUPS = [
  {
    label: "Mouth", match: /^(mouth|jaw|cheek|tongue|nose)/,
    items: [
      one("Open", "jawOpen"), pair("Smile", "mouthSmile"), pair("Frown", "mouthFrown"), one("Pucker", "mouthPucker"),
      one("Round", "mouthFunnel"), pair("Wide", "mouthStretch"), { label: "Sideways", minus: ["mouthRight"], plus: ["mouthLeft"] },
      { label: "Jaw sideways", minus: ["jawRight"], plus: ["jawLeft"] }, one("Jaw forward", "jawForward"),
      pair("Upper lip up", "mouthUpperUp"), pair("Lower lip down", "mouthLowerDown"), pair("Press", "mouthPress"),
      one("Roll upper lip in", "mouthRollUpper"), one("Roll lower lip in", "mouthRollLower"),
      one("Shrug upper lip", "mouthShrugUpper"), one("Shrug lower lip", "mouthShrugLower"), pair("Dimples", "mouthDimple"),
      one("Close over open jaw", "mouthClose"), one("Puff cheeks", "cheekPuff"), pair("Sneer", "noseSneer"),
      one("Tongue out", "tongueOut"),
    ],
  },
  {
    label: "Eyes", match: /^eye/,
    items: [
      { label: "Look aside", minus: ["eyeLookInLeft", "eyeLookOutRight"], plus: ["eyeLookOutLeft", "eyeLookInRight"] },
      { label: "Look up or down", minus: ["eyeLookDownLeft", "eyeLookDownRight"], plus: ["eyeLookUpLeft", "eyeLookUpRight"] },
      pair("Shut", "eyeBlink"), pair("Squint", "eyeSquint"), pair("Wide open", "eyeWide"), pair("Raise cheeks", "cheekSquint"),
    ],
  },
  {
    label: "Brows", match: /^brow/,
    items: [one("Raise inside", "browInnerUp"), pair("Raise outside", "browOuterUp"), pair("Lower", "browDown")],
  },
];
const HEAD = [
  { label: "Turn", joint: "neck", axis: 1, limit: 0.7 },
  { label: "Nod", joint: "neck", axis: 0, limit: 0.5 },
  { label: "Tilt", joint: "neck", axis: 2, limit: 0.5 },
  { label: "Jaw hinge", joint: "jaw", axis: 0, limit: 0.3, low: 0 },
  { label: "Whole body", joint: "body", axis: 1, limit: 0.7 },
];

// The groups of what a head has: items with `plus` and `minus` as places in its names. `apart` gives each side its own.
function groupsFor(names, apart) {
  const place = new Map(names.map((name, i) => [name, i]));
  const left = new Set(names);
  const groups = GROUPS.map(({ label, match, items }) => {
    const found = [];
    for (const item of items) {
      const all = [...item.plus, ...(item.minus ?? [])];
      if (!all.every((name) => place.has(name))) continue;
      all.forEach((name) => left.delete(name));
      const sides = apart && item.plus.length === 2 && !item.minus;
      if (sides) for (const name of item.plus) found.push({ label: `${item.label}, ${name.match(/Left|Right/)[0].toLowerCase()}`, plus: [name] });
      else found.push(item);
    }
    return { label, match, items: found };
  });
  for (const name of left) (groups.find(({ match }) => match.test(name)) ?? groups[0]).items.push(one(words(name), name));
  const places = (list) => (list ?? []).map((name) => place.get(name));
  return groups.map(({ label, items }) => ({
    label, items: items.map((item) => ({ ...item, plus: places(item.plus), minus: places(item.minus) })),
  }));
}

function words(name) {
  const text = name.replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase();
  return text[0].toUpperCase() + text.slice(1);
}
