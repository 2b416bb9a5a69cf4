#version 300 es
// alpha = opacity · exp(-½ dᵀ Σ⁻¹ d), not below 1/255 and at most 0.999; premultiplied.
precision highp float;

in vec2 corner;
flat in vec3 color;
flat in vec2 strength;

out vec4 pixel;

void main() {
  float away = dot(corner, corner);
  if (away > 1.0) discard;
  float alpha = min(strength.x * exp(-strength.y * away), 0.999);
  pixel = vec4(color * alpha, alpha);
}
