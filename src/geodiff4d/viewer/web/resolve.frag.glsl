#version 300 es
// Puts the background, premultiplied, behind what was blended. What lies outside of the images that the avatar was
// fitted to is anybody's guess: it fades out towards the border of their frame.
precision highp float;

uniform sampler2D blended;
uniform vec4 background;
uniform vec2 size;           // of the canvas in pixels

uniform vec4 frame;          // middle and half size of the fitted images' frame in pixels, y up; no fading where 0

out vec4 pixel;

void main() {
  vec4 front = texture(blended, gl_FragCoord.xy / size);
  if (frame.z > 0.0) {
    vec2 away = (gl_FragCoord.xy - frame.xy) / frame.zw;
    float shown = 1.0 - smoothstep(0.82, 1.0, length(vec2(away.x, min(away.y, 0.0)) * vec2(0.8, 1.0)));
    front *= shown * (1.0 - smoothstep(0.92, 1.0, abs(away.x)));
  }
  pixel = front + (1.0 - front.a) * background;
}
