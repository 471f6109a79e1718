/**
 * What a server keeps to itself: the hashes of tokens, and its certificate with the key.
 *
 * The supervisor alone reads the files, when it starts and on SIGHUP, and hands what they hold to each worker: so all have
 * the same, a worker that starts later too, and a file that cannot be read leaves everything as it was.
 */
import { createPrivateKey, X509Certificate } from "node:crypto";
import { readFileSync, realpathSync } from "node:fs";
import type { Certificate } from "./connection.ts";
import { quote, RepriseError } from "./protocol.ts";
import { readTokens, type Token } from "./tokens.ts";

export interface Secrets {
  /** Undefined where nobody needs one. */
  tokens?: Token[] | undefined;
  certificate?: Certificate | undefined;
}

export interface SecretFiles {
  tokens?: string | undefined;
  tls?: { cert: string; key: string } | undefined;
}

/** Throws `local` for what cannot be read, `usage` for what is not what it should be, or lies where it is served. */
export function readSecrets(files: SecretFiles & { root: string }): Secrets {
  for (const file of [files.tokens, files.tls?.key]) if (file !== undefined) checkPlace(file, files.root);
  return { tokens: readTokensOf(files), certificate: readCertificateOf(files) };
}

export function readTokensOf({ tokens }: SecretFiles): Token[] | undefined {
  return tokens === undefined ? undefined : readTokens(tokens);
}

export function readCertificateOf({ tls }: SecretFiles): Certificate | undefined {
  return tls && readCertificate(tls);
}

function checkPlace(file: string, root: string): void {
  try {
    if (!realpathSync(file).startsWith(`${realpathSync(root)}/`)) return;
  } catch {
    // It is not there: reading it says so.
    return;
  }
  throw new RepriseError("usage", `${quote(file)} lies in the folder that is served; move it out of there`);
}

function readCertificate(files: { cert: string; key: string }): Certificate {
  const certificate = { cert: readText(files.cert), key: readText(files.key) };
  try {
    const isItsKey = new X509Certificate(certificate.cert).checkPrivateKey(createPrivateKey(certificate.key));
    // As each connection will, of the whole chain: a file of which the end is missing is found now.
    if (isItsKey) (require("node:tls") as typeof import("node:tls")).createSecureContext(certificate);
    if (isItsKey) return certificate;
  } catch (error) {
    const what = `${quote(files.cert)} and ${quote(files.key)} are no certificate and key in PEM`;
    throw new RepriseError("usage", `${what}: ${(error as Error).message}`, error);
  }
  throw new RepriseError("usage", `${quote(files.key)} is not the key of the certificate ${quote(files.cert)}`);
}

function readText(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new RepriseError("local", `cannot read ${quote(path)}: ${(error as NodeJS.ErrnoException).code}`, error);
  }
}
