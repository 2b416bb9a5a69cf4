// Short movements that somebody can ask for: weights by name over time, drawn by hand. Each returns null when it ends.

const ease = (x) => { const t = Math.min(1, Math.max(0, x)); return t * t * (3 - 2 * t); };
// Up in `rise` seconds, held, down again by `end`.
const held = (t, rise, end) => ease(t / rise) * ease((end - t) / rise);
const bump = (t, centre, half) => ease(1 - Math.abs(t - centre) / half);
const both = (name, value) => ({ [`${name}Left`]: value, [`${name}Right`]: value });

function gaze(across, up) {
  const out = {};
  if (across > 0) Object.assign(out, { eyeLookOutLeft: across, eyeLookInRight: across });
  if (across < 0) Object.assign(out, { eyeLookInLeft: -across, eyeLookOutRight: -across });
  if (up > 0) Object.assign(out, both("eyeLookUp", up));
  if (up < 0) Object.assign(out, both("eyeLookDown", -up));
  return out;
}

// Opening, width and rounding of the mouth, syllable by syllable: [seconds, jawOpen, mouthFunnel, mouthStretch].
const SYLLABLES = [
  [0.16, 0.35, 0.0, 0.15], [0.12, 0.08, 0.3, 0.0], [0.2, 0.45, 0.1, 0.1], [0.1, 0.02, 0.0, 0.2], [0.18, 0.28, 0.4, 0.0],
  [0.14, 0.12, 0.0, 0.3], [0.22, 0.5, 0.0, 0.1], [0.12, 0.0, 0.0, 0.0], [0.16, 0.3, 0.25, 0.0], [0.2, 0.2, 0.0, 0.25],
  [0.14, 0.05, 0.45, 0.0], [0.2, 0.38, 0.0, 0.1], [0.24, 0.0, 0.0, 0.0],
];

function talk(t) {
  const whole = SYLLABLES.reduce((sum, [seconds]) => sum + seconds, 0);
  if (t > 2 * whole) return null;
  let open = 0, round = 0, wide = 0, middle = 0;
  for (const [seconds, jaw, funnel, stretch] of SYLLABLES) {
    const near = bump(t % whole, middle + seconds / 2, 0.9 * seconds);
    open += near * jaw; round += near * funnel; wide += near * stretch;
    middle += seconds;
  }
  const brow = 0.3 * (bump(t, 0.5, 0.4) + bump(t, 2.9, 0.5));
  const blink = bump(t, 1.6, 0.1) + bump(t, 3.4, 0.1);
  return {
    weights: {
      jawOpen: 0.8 * open, mouthFunnel: round, ...both("mouthStretch", wide), ...both("mouthLowerDown", 0.5 * open),
      browInnerUp: brow, ...both("eyeBlink", blink),
    },
    neck: [0.04 * Math.sin(2.1 * t), 0.06 * Math.sin(1.3 * t), 0.02 * Math.sin(1.7 * t)],
  };
}

function lookAround(t) {
  if (t > 4.6) return null;
  const stops = [[0.3, 0, 0], [1.2, 0.8, 0.1], [2.2, -0.8, 0.1], [3.1, -0.2, 0.6], [3.9, 0.1, -0.4], [4.6, 0, 0]];
  let [time, across, up] = [0, 0, 0];
  for (const [end, x, y] of stops) {
    const share = ease((t - time) / 0.25);
    if (t < end) { across += share * (x - across); up += share * (y - up); break; }
    [time, across, up] = [end, x, y];
  }
  const blink = bump(t, 1.25, 0.1) + bump(t, 3.1, 0.1);
  return { weights: { ...gaze(across, up), ...both("eyeBlink", blink) }, neck: [-0.1 * up, 0.22 * across, 0] };
}

const MOTIONS = {
  smile: {
    label: "Smile",
    at: (t) => t > 2.6 ? null : {
      weights: scaled(held(t, 0.45, 2.6), {
        ...both("mouthSmile", 0.85), ...both("cheekSquint", 0.4), ...both("eyeSquint", 0.25), ...both("mouthDimple", 0.15),
      }),
    },
  },
  blink: { label: "Blink", at: (t) => t > 0.36 ? null : { weights: both("eyeBlink", bump(t, 0.16, 0.17)) } },
  surprise: {
    label: "Surprise",
    at: (t) => t > 1.9 ? null : {
      weights: scaled(held(t, 0.22, 1.9), {
        jawOpen: 0.45, browInnerUp: 0.8, ...both("browOuterUp", 0.7), ...both("eyeWide", 0.7),
      }),
    },
  },
  look: { label: "Look around", at: lookAround },
  talk: { label: "Talk", at: talk },
};

function scaled(share, weights) {
  return Object.fromEntries(Object.entries(weights).map(([name, value]) => [name, share * value]));
}
