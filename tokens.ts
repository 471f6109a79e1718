/**
 * Access tokens: who may do what, and where, as a file of JSON that holds their hashes and never themselves.
 *
 * ```json
 * {"tokens": [{"name": "ann", "access": "write", "folder": "photos", "sha256": "…", "created": "…", "expires": "…"}]}
 * ```
 *
 * A token is 256 random bits, so a plain sha256 of it tells nothing. It is compared with every hash there is, in constant
 * time, so that the time of an answer tells nothing either.
 */
import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import {
  closeSync,
  fchmodSync,
  fchownSync,
  fstatSync,
  fsyncSync,
  openSync,
  readFileSync,
  renameSync,
  type Stats,
  writeFileSync,
} from "node:fs";
import { dirname } from "node:path";
import { command, print, say, usage } from "./command.ts";
import { Held, openLocked, removeIfThere, unlock } from "./disk.ts";
import { quote, RepriseError, splitPath, toJson } from "./protocol.ts";
import { isHidden } from "./storage.ts";

/** What a token allows: `write` also reads; `replica` reads, and will join a cluster. */
export const ACCESSES = ["read", "write", "replica"] as const;
export type Access = (typeof ACCESSES)[number];

export interface Token {
  name: string;
  access: Access;
  /** The folder that its holder sees as the root; "" for all. */
  folder: string;
  /** Hexadecimal, of the token's text. */
  sha256: string;
  /** ISO 8601, as `expires`. */
  created: string;
  expires?: string | undefined;
}

const TOKEN_BYTES = 32;
/** Lets scanners of sources know one that was left lying about. */
const TOKEN_PREFIX = "rprs_";
const FIELDS = ["name", "access", "folder", "sha256", "created", "expires"];
const NAME = /^[\w.@-]{1,64}$/;

/** What a server knows of tokens, until it reads the file again. */
export class Tokens {
  readonly #tokens: readonly { token: Token; digest: Buffer }[];
  /** These, and those of an earlier reading that were found to be the same. */
  readonly #known: WeakSet<Token>;

  constructor(tokens: readonly Token[]) {
    this.#tokens = tokens.map((token) => ({ token, digest: Buffer.from(token.sha256, "hex") }));
    this.#known = new WeakSet(tokens);
  }

  /** The token that was presented, if it is known: see `hasExpired`. */
  find(text: string): Token | undefined {
    const digest = digestOf(text);
    let found: Token | undefined;
    for (const entry of this.#tokens) if (timingSafeEqual(entry.digest, digest)) found = entry.token;
    return found;
  }

  /** Whether a token that was found, perhaps by another reading of the file, still stands for the same. */
  holds(token: Token): boolean {
    if (hasExpired(token)) return false;
    if (this.#known.has(token)) return true;
    const isSame = this.#tokens.some((entry) => Bun.deepEquals(entry.token, token));
    if (isSame) this.#known.add(token);
    return isSame;
  }
}

/** Reads the file. Throws `local`, or `usage` where it is not what it should be. */
export function readTokens(path: string): Token[] {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    const why = (error as NodeJS.ErrnoException).code;
    throw new RepriseError("local", `the tokens in ${quote(path)} cannot be read: ${why}`, error);
  }
  return parseTokens(text, path);
}

/** Makes a token and returns its text, which is then written nowhere. Throws `exists`, `usage`, `local`. */
export function addToken(path: string, entry: Pick<Token, "name" | "access" | "folder" | "expires">): string {
  if (!NAME.test(entry.name))
    throw new RepriseError("usage", `${quote(entry.name)} is no name: use letters and digits`);
  if (splitPath(entry.folder).some(isHidden)) throw new RepriseError("usage", `${quote(entry.folder)} is never served`);
  const text = TOKEN_PREFIX + randomBytes(TOKEN_BYTES).toString("base64url");
  change(path, (tokens) => {
    if (tokens.some(({ name }) => name === entry.name))
      throw new RepriseError(
        "exists",
        `there is a token ${quote(entry.name)}; remove it first, or choose another name`,
      );
    return [...tokens, { ...entry, sha256: digestOf(text).toString("hex"), created: new Date().toISOString() }];
  });
  return text;
}

/** Throws `not_found`, and `local` where there is no file: none is made to find nothing in it. */
export function removeToken(path: string, name: string): void {
  readTokens(path);
  change(path, (tokens) => {
    const left = tokens.filter((token) => token.name !== name);
    if (left.length === tokens.length) throw new RepriseError("not_found", `there is no token ${quote(name)}`);
    return left;
  });
}

export function hasExpired({ expires }: Token): boolean {
  return expires !== undefined && Date.parse(expires) <= Date.now();
}

function digestOf(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}

/** Replaces the file, one process at a time: a server that reads meanwhile has the old one or the new one, whole. */
function change(path: string, make: (tokens: Token[]) => Token[]): void {
  let lock: number | undefined;
  try {
    lock = openLocked(path, 0o600);
    replace(path, make(parseTokens(readFileSync(lock, "utf8"), path)), fstatSync(lock));
  } catch (error) {
    if (error instanceof RepriseError) throw error;
    const why = error instanceof Held ? error.message : (error as NodeJS.ErrnoException).code;
    throw new RepriseError("local", `the tokens in ${quote(path)} cannot be changed: ${why}`, error);
  } finally {
    if (lock !== undefined) {
      unlock(lock, path);
      closeSync(lock);
    }
  }
}

/** For who has the lock: what has the temporary name then is of nobody who is still at work. */
function replace(path: string, tokens: Token[], before: Stats): void {
  const temporary = `${path}.new`;
  removeIfThere(temporary);
  try {
    writeSynced(temporary, `${JSON.stringify({ tokens }, undefined, 2)}\n`, before);
    renameSync(temporary, path);
  } catch (error) {
    removeIfThere(temporary);
    throw error;
  }
  syncFolder(dirname(path));
}

/**
 * All of it, or an error: on a full disk a single write may well end early and say nothing. Who could read the file before,
 * such as a server that runs as another user, can read it afterwards.
 */
function writeSynced(path: string, text: string, { mode, uid, gid }: Stats): void {
  const fd = openSync(path, "wx", 0o600);
  try {
    const own = fstatSync(fd);
    if (own.uid !== uid || own.gid !== gid) fchownSync(fd, uid, gid);
    fchmodSync(fd, mode & 0o777);
    writeFileSync(fd, text);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

function syncFolder(path: string): void {
  const fd = openSync(path, "r");
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** An empty file has no tokens, and lets nobody in. */
function parseTokens(text: string, path: string): Token[] {
  if (text === "") return [];
  try {
    const { tokens } = JSON.parse(text) as { tokens: unknown[] };
    return tokens.map(checked);
  } catch (error) {
    throw new RepriseError("usage", `${quote(path)} is no file of tokens: ${(error as Error).message}`, error);
  }
}

function checked(value: unknown): Token {
  const { name, access, folder, sha256, created, expires } = value as Token;
  const unknown = Object.keys(value as object).find((key) => !FIELDS.includes(key));
  // One that means nothing here may have been meant for one that does, such as an end.
  if (unknown !== undefined) throw new Error(`${toJson(unknown)} is no field of an entry`);
  const isWhole =
    typeof name === "string" &&
    NAME.test(name) &&
    ACCESSES.includes(access) &&
    typeof folder === "string" &&
    /^[0-9a-f]{64}$/.test(sha256) &&
    (expires === undefined || (typeof expires === "string" && !Number.isNaN(Date.parse(expires))));
  if (!isWhole) throw new Error(`an entry is incomplete: ${toJson(name ?? null)}`);
  return { name, access, folder, sha256, created, ...(expires !== undefined && { expires }) };
}

// ---------------------------------------------------------------------------------------------------- command line

const file = {
  tokens: { type: "string", default: "tokens.json", valueHint: "file", description: "Where they are" },
} as const;

const DURATION_UNITS = { m: 60, h: 3600, d: 86_400, w: 604_800 } as const;

/** `30d`, `12h`, as the moment that is so far from now. Throws `usage`. */
function expiryOf(text: string): string {
  const match = /^(\d{1,5})([mhdw])$/.exec(text);
  if (!match || Number(match[1]) === 0)
    throw usage(`--expires takes a time such as 90m, 12h, 30d or 2w, not ${quote(text)}`);
  const seconds = Number(match[1]) * DURATION_UNITS[match[2] as keyof typeof DURATION_UNITS];
  return new Date(Date.now() + seconds * 1000).toISOString();
}

const add = command({
  meta: { name: "add", description: "Make a token and print it, this once" },
  args: {
    name: { type: "positional", required: true, description: "What the token is called in the list and in the log" },
    access: { type: "string", valueHint: ACCESSES.join("|"), description: "What it allows" },
    folder: { type: "string", valueHint: "dir", description: "What its holder sees as the root" },
    expires: { type: "string", valueHint: "time", description: "12h, 30d: how long it is good for" },
    ...file,
  },
  examples: ["bun server.ts token add ann --access write --folder photos --expires 30d"],
  async run({ args }) {
    const { name, access, folder, expires, tokens } = args as unknown as Record<string, string | undefined>;
    if (!ACCESSES.includes(access as Access))
      throw usage(`--access takes ${ACCESSES.join(", ")}, not ${quote(access ?? "")}`);
    // An empty one is rather a variable that is not set than the wish to give away everything.
    if (folder !== undefined && /^\/*$/.test(folder)) throw usage("--folder is empty; leave it out for the whole root");
    const entry = { name: name!, access: access as Access, folder: folder?.replace(/\/+$/, "") ?? "" };
    const text = addToken(tokens!, { ...entry, ...(expires !== undefined && { expires: expiryOf(expires) }) });
    await print(text);
    say("info", `only its hash is in ${quote(tokens!)}: keep it now; a running server takes it in on SIGHUP`);
  },
});

const list = command({
  meta: { name: "list", description: "Names of the tokens, and what they allow" },
  args: { json: { type: "boolean", description: "One JSON object a line" }, ...file },
  async run({ args }) {
    const { json, tokens: path } = args as unknown as { json?: boolean; tokens: string };
    for (const token of readTokens(path)) {
      const { name, access, folder, created, expires } = token;
      const until = expires === undefined ? "" : `${hasExpired(token) ? "expired" : "until"} ${expires.slice(0, 16)}Z`;
      const text = `${name.padEnd(20)} ${access.padEnd(7)} ${quote(folder === "" ? "/" : folder)}  ${until}`;
      await print(json ? toJson({ name, access, folder, created, expires }) : text.trimEnd());
    }
  },
});

const remove = command({
  meta: { name: "remove", description: "Forget a token" },
  args: { name: { type: "positional", required: true, description: "What it is called" }, ...file },
  async run({ args }) {
    const { name, tokens } = args as unknown as Record<string, string>;
    removeToken(tokens!, name!);
    say("info", `removed ${quote(name!)}; a running server takes it in on SIGHUP`);
  },
});

export const token = command({
  meta: { name: "token", description: "Say who may use a server that is started with --tokens" },
  subCommands: { add, list, remove },
});
