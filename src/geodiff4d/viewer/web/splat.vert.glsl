#version 300 es
// One splat: from the frame of its triangle to the world, then projected (EWA splatting), as avatar/binding.py and
// render/rasterizer_oracle.py have it. Drawn as a square of four corners in units of the splat's own extent.
precision highp float;
precision highp int;
precision highp usampler2D;

const int TEXELS = 1024;     // width of every texture
const float NEAR = 0.01;     // metres
const float BLUR = 0.3;      // square pixels, added to every covariance

in uint splat;

uniform sampler2D vertices;  // posed, metres
uniform usampler2D faces;    // three vertices of each
uniform usampler2D splats;   // position and face, rotation, scales and opacity
uniform usampler2D colors;   // sRGB
uniform usampler2D harmonics;  // what depends on the view: 3, 8 or 15 coefficients a splat, in its triangle's frame
uniform int harmonicCount;
uniform vec3 harmonicLow[15], harmonicStep[15];
uniform vec3 meanLow, meanStep, scaleLow, scaleStep;
uniform vec4 quatLow, quatStep;
uniform vec4 shareLow, shareStep;  // red, green, blue, opacity
uniform mat3 turn;           // world to camera
uniform vec3 shift;
uniform vec3 eye;
uniform vec4 lens;           // fx, fy, cx, cy in pixels
uniform vec2 size;           // of the image in pixels
uniform bool normals;

out vec2 corner;
flat out vec3 color;
flat out vec2 strength;      // opacity, and the exponent at which alpha is 1/255

ivec2 place(uint i) {
  return ivec2(int(i) % TEXELS, int(i) / TEXELS);
}

vec3 vertex(uint i) {
  return texelFetch(vertices, place(i), 0).xyz;
}

vec3 unit(vec3 v) {
  return v / max(length(v), 1e-12);
}

mat3 rotation(vec4 q) {
  float w = q.x, x = q.y, y = q.z, z = q.w;
  return mat3(
    1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y),
    2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x),
    2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y));
}

vec4 bytes(uint i) {
  return vec4(float(i & 255u), float((i >> 8) & 255u), float((i >> 16) & 255u), float(i >> 24));
}

// Real spherical harmonics of degrees 1 to 3, as render/harmonics.py has them.
vec3 seenFrom(vec3 d) {
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  float basis[15] = float[15](
    -0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x,
    1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2.0 * zz - xx - yy),
    -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
    -0.5900435899266435 * y * (3.0 * xx - yy), 2.890611442640554 * x * y * z,
    -0.4570457994644658 * y * (4.0 * zz - xx - yy), 0.3731763325901154 * z * (2.0 * zz - 3.0 * xx - 3.0 * yy),
    -0.4570457994644658 * x * (4.0 * zz - xx - yy), 1.445305721320277 * z * (xx - yy),
    -0.5900435899266435 * x * (xx - 3.0 * yy));
  vec3 sum = vec3(0.0);
  for (int i = 0; i < harmonicCount; i++) {
    uvec3 code = texelFetch(harmonics, place(splat * uint(harmonicCount) + uint(i)), 0).xyz;
    sum += basis[i] * (harmonicLow[i] + harmonicStep[i] * vec3(code));
  }
  return sum;
}

void main() {
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0);  // outside, unless all goes well
  corner = vec2(float(gl_VertexID & 1), float(gl_VertexID >> 1)) * 2.0 - 1.0;
  color = vec3(0.0);
  strength = vec2(0.0);

  uvec4 row = texelFetch(splats, place(splat), 0);
  vec3 mean = meanLow + meanStep * vec3(float(row.x & 65535u), float(row.x >> 16), float(row.y & 65535u));
  uvec3 ends = texelFetch(faces, place(row.y >> 16), 0).xyz;
  vec4 scalesAndOpacity = bytes(row.w);
  vec3 scales = exp(scaleLow + scaleStep * scalesAndOpacity.xyz);
  float opacity = shareLow.w + shareStep.w * scalesAndOpacity.w;
  float limit = log(255.0 * max(opacity, 1e-9));
  if (limit <= 0.0) return;

  vec3 a = vertex(ends.x), b = vertex(ends.y), c = vertex(ends.z);
  vec3 a0 = unit(b - a), a1 = unit(cross(a0, c - a)), a2 = -unit(cross(a1, a0));
  float k = 0.5 * (length(b - a) + abs(dot(a2, c - a)));
  mat3 frame = mat3(a0, a1, a2);
  vec3 world = k * (frame * mean) + (a + b + c) / 3.0;
  vec3 cam = turn * world + shift;
  if (cam.z <= NEAR) return;

  mat3 axes = frame * rotation(normalize(quatLow + quatStep * bytes(row.z)));
  vec2 margin = 0.15 * size / lens.xy;
  vec2 slope = clamp(cam.xy / cam.z, -lens.zw / lens.xy - margin, (size - lens.zw) / lens.xy + margin);
  mat3 M = turn * axes;
  vec3 across = vec3(M[0].x, M[1].x, M[2].x), down = vec3(M[0].y, M[1].y, M[2].y), far = vec3(M[0].z, M[1].z, M[2].z);
  vec3 u = (k * scales) * (across - slope.x * far) * (lens.x / cam.z);
  vec3 v = (k * scales) * (down - slope.y * far) * (lens.y / cam.z);
  float xx = dot(u, u) + BLUR, xy = dot(u, v), yy = dot(v, v) + BLUR;

  // The ellipse where alpha is 1/255 ends at the square's sides.
  float middle = 0.5 * (xx + yy), spread = length(vec2(0.5 * (xx - yy), xy));
  float longer = middle + spread, shorter = max(middle - spread, 1e-6);
  vec2 along = xx >= yy ? vec2(longer - yy, xy) : vec2(xy, longer - xx);
  along = spread < 1e-6 * middle ? vec2(1.0, 0.0) : normalize(along);
  vec2 extent = sqrt(2.0 * limit * vec2(longer, shorter));
  vec2 offset = corner.x * extent.x * along + corner.y * extent.y * vec2(-along.y, along.x);
  vec2 pixel = lens.xy * cam.xy / cam.z + lens.zw + offset;
  gl_Position = vec4(2.0 * pixel.x / size.x - 1.0, 1.0 - 2.0 * pixel.y / size.y, 0.0, 1.0);
  strength = vec2(opacity, limit);
  color = shareLow.xyz + shareStep.xyz * vec3(texelFetch(colors, place(splat), 0).xyz);
  if (harmonicCount > 0) color = max(color + seenFrom(transpose(frame) * unit(world - eye)), vec3(0.0));
  if (normals) {
    vec3 axis = scales.x < min(scales.y, scales.z) ? axes[0] : scales.y < scales.z ? axes[1] : axes[2];
    axis *= dot(axis, eye - world) < 0.0 ? -1.0 : 1.0;
    color = (turn * axis) * vec3(0.5, -0.5, -0.5) + 0.5;
  }
}
