/**
 * Names, messages and secrets, as people write them: what is taken, what is taken out, and what is refused.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { messageInWords, secretBits } from "../client.ts";
import { fingerprintOf, harmless, jsonLine, nameFault, newSecret, parseFingerprint, userName } from "../protocol.ts";
import { random } from "./network.ts";
import { many } from "./testing.ts";

test("nameFault() and userName(): what is a name, as what, and why something is none", () => {
  const rows: [name: string, is: string | RegExp][] = [
    ["alice", "alice"],
    ["Zoë", "Zoë"],
    ["Zoe\u0308", "Zoë"], // one of the two ways to write it
    ["ａｌｉｃｅ", "alice"], // full width
    ["ﬁona", "fiona"], // a ligature
    ["Ⅷ", "VIII"],
    ["иван", "иван"],
    ["Ελένη", "Ελένη"],
    ["田中さん", "田中さん"],
    ["タナカ", "タナカ"],
    ["金철수", "金철수"],
    ["ㄅㄆ王", "ㄅㄆ王"],
    ["محمد", "محمد"],
    ["דוד", "דוד"],
    ["สมชาย", "สมชาย"],
    ["नेहा", "नेहा"],
    ["ᏣᎳᎩ", "ᏣᎳᎩ"],
    ["bob-2_x.", "bob-2_x."],
    ["иван42!", "иван42!"],
    ["🦊fox", "🦊fox"],
    ["a\u0301\u0302\u0303\u0304", "á\u0302\u0303\u0304"],
    ["", /empty/],
    ["two words", /blanks/],
    ["a\u00a0b", /blanks/],
    ["a\u2800", /blanks/],
    ["n".repeat(33), /32 bytes/],
    ["é".repeat(17), /32 bytes/],
    ["a\u200bb", /seen/],
    ["a\u202eb", /seen/],
    ["a\x1b[2J", /seen/],
    ["a\ud800", /seen/],
    ["pаypal", /scripts/], // a Cyrillic а
    ["bοb", /scripts/], // a Greek ο
    ["Ꭺlice", /scripts/], // a Cherokee Ꭺ
    ["aわ", /scripts/],
    ["ひ철", /scripts/],
    ["x" + "\u0301".repeat(6), /marks/],
  ];
  for (const [name, is] of rows) {
    if (typeof is === "string") assert.deepEqual([userName(name), nameFault(name)], [is, null], JSON.stringify(name));
    else {
      assert.equal(userName(name), null, JSON.stringify(name));
      assert.match(nameFault(name)!, is, JSON.stringify(name));
    }
  }
});

const FAMILY = "👨\u200d👩\u200d👧\u200d👦", FLAGS = "🇨🇳🏴\u{e0067}\u{e0062}\u{e0073}\u{e0063}\u{e0074}\u{e007f}";
/** How people write: nothing may be taken out of that. */
const HONEST = [
  "Hello, can you hear me?",
  "Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau",
  "Tra\u0306m na\u0306m co\u0303i ngu\u031bo\u031b\u0300i ta",
  "क्षत्रिय, श्री, र्त्स्न्य",
  "น้ำใจ ที่นี่ ปู่",
  "שָׁלוֹם עֲלֵיכֶם",
  "السَّلَامُ عَلَيْكُمْ",
  "བསྒྲུབས་པ",
  `${FAMILY} ${FLAGS} ❤️‍🔥 1️⃣`,
  "tab\there",
];

test("harmless(): what acts on a terminal is taken out, and nothing else", () => {
  for (const text of HONEST) assert.equal(harmless(text), text);
  const rows: [text: string, left: string][] = [
    ["a\u202eb\u2066c\u2069\u200fd\u061ce", "abcde"],
    ["a\u2028bob: hi\u2029c", "abob: hic"],
    ["a\x1b[2Jb\rc\x9bd\x85", "a\ufffd[2Jb\ufffdc\ufffdd\ufffd"],
    ["a\nb", "a\ufffdb"],
    [`z${"\u0301\u0302\u0303\u0304\u0305\u0306".repeat(20)}!`, "z\u0301\u0302\u0303\u0304!"],
    [`z${"\u0301\u200d".repeat(20)}!`, `z${"\u0301\u200d".repeat(4)}${"\u200d".repeat(16)}!`],
    [`z${"\u0301\u2028\u202e".repeat(20)}!`, `z${"\u0301".repeat(4)}!`],
    [`z${"\u{1d165}".repeat(9)}`, `z${"\u{1d165}".repeat(4)}`],
  ];
  for (const [text, left] of rows) assert.equal(harmless(text), left, JSON.stringify(text));
  const began = performance.now();
  harmless("\u200d".repeat(30_000) + "z\u0301".repeat(15_000) + "\u0301\u200d".repeat(15_000)); // the longest message
  assert.ok(performance.now() - began < 500);
});

test("messageInWords(): no line of a message looks like one of somebody else, wherever the terminal ends it", () => {
  const show = (text: string, width?: number) => messageInWords({ from: "eve", text, path: "relay" }, width);
  assert.equal(show("hi"), "eve: hi  (relay)");
  assert.equal(
    show("a\nbob: b\r\ncarol: c\rdave: d\n"),
    "eve: a\n    bob: b\n    carol: c\n    dave: d\n      (relay)",
  );
  assert.equal(show("a\tb\u2028c\x1b"), "eve: a    bc\ufffd  (relay)");
  const next = random("lines"), letters = ["a", " ", "\n", "\t", "中", "é", "\u0301", "🦊", "bob: hi"];
  for (let seed = 0; seed < many(5_000, 500); seed++) {
    const width = 20 + Math.floor(next() * 60);
    const text = Array.from({ length: 200 }, () => letters[Math.floor(next() * letters.length)]).join("");
    const [first, ...others] = show(text, width).split("\n");
    assert.ok(first!.startsWith("eve: ") && others.length > 0);
    for (const line of others) assert.ok(line.startsWith("    "), JSON.stringify(line));
    for (const line of [first!, ...others]) { // a wide letter takes two columns, a mark none
      const columns = [...line.replace(/\p{M}/gu, "").replace(/[中🦊]/gu, "__")].length;
      assert.ok(columns < width, `${columns} of ${width}: ${JSON.stringify(line)}`);
    }
  }
  const began = performance.now();
  show("x".repeat(65_536), 80);
  assert.ok(performance.now() - began < 1_000);
});

test("jsonLine(): the same is escaped, so that a program reads what was written", () => {
  const bad = /[\x7f-\x9f\u2028\u2029]|\p{Bidi_Control}|\p{M}{5}/u;
  const next = random("json");
  const letters = [
    "a",
    "\u0301",
    "\u200d",
    "\u202e",
    "\u2029",
    "\x1b",
    "\x85",
    "\ud83d",
    "\ude00",
    "\u{1d165}",
    '"',
    "\\",
  ];
  for (let seed = 0; seed < many(20_000, 2_000); seed++) {
    const text = Array.from({ length: 12 }, () => letters[Math.floor(next() * letters.length)]).join("");
    const line = jsonLine({ event: "message", text });
    assert.ok(!bad.test(line) && !line.includes("\n"), line);
    assert.equal(JSON.parse(line).text, text);
  }
  for (const text of HONEST.slice(0, -1)) assert.ok(jsonLine({ text }).includes(text));
});

test("a fingerprint is read as it is typed, and nothing else is one", () => {
  const key = Uint8Array.from({ length: 32 }, (_, i) => i), fingerprint = fingerprintOf(key);
  assert.match(fingerprint, /^([a-km-np-z2-9]{4}-){4}[a-km-np-z2-9]{4}$/);
  for (const typed of [fingerprint, fingerprint.toUpperCase(), fingerprint.replaceAll("-", ""), ` ${fingerprint} `]) {
    assert.equal(parseFingerprint(typed), fingerprint);
  }
  for (const typed of ["", fingerprint.slice(1), `${fingerprint}a`, fingerprint.replace(/./, "0"), `#${fingerprint}`]) {
    assert.equal(parseFingerprint(typed), null, typed);
  }
  assert.notEqual(fingerprintOf(key.map((byte) => byte ^ 1)), fingerprint);
});

test("secretBits(): what --new-secret makes is strong, and what people make up seldom is", () => {
  for (let i = 0; i < 1_000; i++) assert.ok(secretBits(newSecret()) >= 60);
  const weak = ["", "a", "hunter2", "password", "Passw0rd!", "12345678", "qwertyuiop", "iloveyou", "我爱你"];
  weak.push(
    "a".repeat(1_000),
    "ab".repeat(500),
    "word ".repeat(100),
    "correct horse battery",
    "2026-11-25",
    "\u0301".repeat(99),
  );
  for (const secret of weak) assert.ok(secretBits(secret) < 60, `${secret}: ${secretBits(secret)}`);
  const strong = ["9f86d081884c7d659a2feaa0c55ad015", "verb lamp oxide quarrel tundra", "正确的马电池订书钉"];
  strong.push("b3BlbnNzbCByYW5kIC1iYXNlNjQ=", "3f1c0b52-8d0a-4c55-9e9e-1f0a7c2b6d11");
  for (const secret of strong) assert.ok(secretBits(secret) >= 60, `${secret}: ${secretBits(secret)}`);
});
